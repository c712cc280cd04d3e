"""held_out.jsonl: what a resumed run keeps."""

import numpy as np

from segjax.report.held_out_log import HeldOutLog, read_held_out


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
  assert read_held_out(tmp_path) == []
  first = HeldOutLog(tmp_path)
  first.write(HeldOutLog.BEFORE, 0.0, np.array([0.1, 0.2]))
  for step in (2, 5, 8):
    first.write(step, step / 2, np.array([0.1, step]))
  with (tmp_path / 'held_out.jsonl').open('a') as file:
    file.write('{"step": 11, "kl"')  # killed while it wrote
  HeldOutLog(tmp_path).write(5, 2.25, np.array([0.3, 0.4]))
  points = read_held_out(tmp_path)
  assert [(point.step, point.kl) for point in points] == [(-1, 0.0), (2, 1.0), (5, 2.25)]
  np.testing.assert_array_equal(points[-1].gold, [0.3, 0.4])
  HeldOutLog(tmp_path).write(HeldOutLog.BEFORE, 0.0, np.array([0.5]))  # from the beginning
  assert [point.step for point in read_held_out(tmp_path)] == [-1]
