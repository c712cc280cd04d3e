"""Which pages of a group of rows are free, on the host."""


class PagePool:
  """The pages of one group: each has as many owners as hold it, and is free without any.

  Page 0 is never handed out: what belongs to no row is written there.
  """

  def __init__(self, num_pages: int):
    self._owners = [0] * num_pages
    self._free = list(range(num_pages - 1, 0, -1))  # the lowest numbers first

  @property
  def num_free(self) -> int:
    """Number of free pages."""
    return len(self._free)

  def allocate(self, count: int) -> list[int]:
    """Takes `count` free pages; there must be as many."""
    pages = [self._free.pop() for _ in range(count)]
    self.share(pages)
    return pages

  def share(self, pages: list[int]) -> None:
    """Adds an owner to each page."""
    for page in pages:
      self._owners[page] += 1

  def is_free(self, page: int) -> bool:
    """Returns whether the page has no owner."""
    return not self._owners[page]

  def release(self, pages: list[int]) -> None:
    """Removes an owner from each page, and frees those without any."""
    for page in pages:
      self._owners[page] -= 1
      if not self._owners[page]:
        self._free.append(page)
