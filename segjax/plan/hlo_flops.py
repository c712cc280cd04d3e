"""Arithmetic of the instructions of a compiled program; a multiplication with an addition is two.

Matrix products count, in `dot`, in `convolution` (as TPU programs write them), in custom calls of
cuBLAS, and in kernels of attention, whose inside the text does not show. Elementwise work does not
count: it is bound by memory.
"""

import math
import re

import numpy as np

from segjax.plan.hlo import Computation, Instruction, Program

# Matrix products of an attention kernel for each pair of positions. Forward: q kᵀ and p v.
# Backward: q kᵀ again, and the gradients of v, p, q and k. A kernel for the gradient of q alone, or
# of k and v alone, also computes the gradient of p.
_FORWARD, _BACKWARD = 2, 5
_PRODUCTS = (('dkv_dq', 5), ('dq', 3), ('dkv', 4), ('bwd', _BACKWARD), ('', _FORWARD))
_LOGITS = re.compile(r'"intermediate_tensor_shape".*?"dimensions":\s*\[([^\]]*)')
_KERNEL = re.compile(r'(?:splash|flash)\w*')


def products(program: Program, computation: Computation, instruction: Instruction) -> float:
  """Returns the operations of the matrix products in an instruction, attention kernels apart."""
  if instruction.is_fusion:
    fused = program.computations[instruction.called[0]]
    return sum((products(program, fused, part) for part in fused.values()), 0.0)
  if instruction.opcode == 'dot':
    return _dot(computation, instruction)
  if instruction.opcode == 'convolution':
    return _convolution(computation, instruction)
  if instruction.opcode == 'custom-call' and '"__cublas$' in instruction.attributes:
    return _dot(computation, instruction)
  return 0.0


def _dims(instruction: Instruction) -> list[int]:
  """Returns the dimensions of the first array of a result."""
  match = re.search(r'\w+\[([\d,]*)\]', instruction.type)
  return [int(n) for n in match[1].split(',') if n] if match else []


def _dot(computation: Computation, instruction: Instruction) -> float:
  contracted = re.search(
    r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[{\[]([^}\]]*)[}\]]', instruction.attributes
  )
  lhs = _dims(computation[instruction.operands[0]])
  numbers = re.findall(r'\d+', contracted[1]) if contracted else []
  return 2.0 * math.prod(_dims(instruction)) * math.prod(lhs[int(n)] for n in numbers)


def _convolution(computation: Computation, instruction: Instruction) -> float:
  """Returns 2 · batch · features in · features out · positions where kernel and input overlap."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
  assert labels, instruction.attributes
  left, right = (_dims(computation[name]) for name in instruction.operands[:2])
  sizes = dict(zip(labels[1], left, strict=True))
  kernel = dict(zip(labels[2], right, strict=True))
  result = dict(zip(labels[3], _dims(instruction), strict=True))
  batch_groups = re.search(r'batch_group_count=(\d+)', instruction.attributes)
  total = 2.0 * sizes['b'] * kernel['i'] * kernel['o']
  total /= int(batch_groups[1]) if batch_groups else 1
  for axis in (label for label in labels[1] if label.isdigit()):
    window = _window(instruction.attributes, int(axis))
    total *= _overlaps(sizes[axis], kernel[axis], result[axis], **window)
  return total


def _window(attributes: str, axis: int) -> dict[str, int]:
  """Returns stride, padding before the input, and dilations of a convolution along an axis."""
  match = re.search(r'window=\{([^}]*)\}', attributes)
  fields = dict(part.split('=') for part in match[1].split()) if match else {}

  def field(name: str, default: str) -> str:
    return fields[name].split('x')[axis] if name in fields else default

  return {
    'stride': int(field('stride', '1')),
    'before': int(field('pad', '0_0').split('_')[0]),
    'input_step': int(field('lhs_dilate', '1')),
    'kernel_step': int(field('rhs_dilate', '1')),
  }


def _overlaps(
  size: int,
  kernel: int,
  result: int,
  *,
  stride: int,
  before: int,
  input_step: int,
  kernel_step: int,
) -> int:
  """Returns the pairs of positions of the result and the kernel that meet an entry of the input."""
  at = np.arange(result)[:, None] * stride + np.arange(kernel) * kernel_step - before
  is_entry = (at >= 0) & (at % input_step == 0) & (at // input_step < size)
  return int(np.sum(is_entry))


def attention(computation: Computation, instruction: Instruction, attended: float) -> float:
  """Returns the operations of a kernel of attention; 0 for other instructions.

  A call of cuDNN has its shapes and its mask in the text. Of a Pallas kernel, whose name contains
  `flash` or `splash`, the first operand in floating point is the queries: of shape [..., h], with
  the length S of a row as the largest of the other dimensions. It does
  products · 2 · (size of the queries) · S · attended operations.

  Args:
    attended: share of the S² pairs of positions of a row that a Pallas kernel computes; 1/2 for
      causal attention in rows of one sequence, less where several are packed.
  """
  if instruction.opcode != 'custom-call':
    return 0.0
  operands = [computation[name] for name in instruction.operands]
  if '"__cudnn$fmha' in instruction.attributes:
    logits = re.search(
      r'"intermediate_tensor_shape".*?"dimensions":\s*\[([^\]]*)', instruction.attributes
    )
    assert logits, instruction.attributes
    pairs = math.prod(int(n) for n in re.findall(r'\d+', logits[1]))
    share = 0.5 if 'CAUSAL' in instruction.attributes else 1.0
    count = _BACKWARD if 'Backward' in instruction.attributes else _FORWARD
    return 2.0 * count * pairs * _dims(operands[0])[-1] * share
  place = re.search(r'op_name="([^"]*)"', instruction.attributes)
  kernels = _KERNEL.findall(f'{place[1] if place else ""} {instruction.name}')
  if not kernels:
    return 0.0
  queries = next(_dims(x) for x in operands if x.type.startswith(('bf16[', 'f32[', 'f16[')))
  count = next(count for part, count in _PRODUCTS if part in kernels[-1])
  return 2.0 * count * math.prod(queries) * max(queries[:-1]) * attended
