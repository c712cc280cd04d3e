"""Arithmetic, memory, exchanges and seconds of small programs, against figures by hand."""

import pytest

from segjax.model.chips import Chip, Rates
from segjax.plan.hlo_cost import program_cost

# 1 FLOP, 1 byte and 1 byte sent take a second each; attention and other nodes are slower.
RATES = Rates(1.0, attention=0.5, memory=1.0, link=1.0, network=0.25)
CHIP = Chip('unit', 1.0, 1.0, 1.0, 1.0, RATES)

MAIN = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}
{computations}
ENTRY %main (x: bf16[4,8], w: bf16[8,16]) -> bf16[4,16] {{
  %x = bf16[4,8]{{1,0}} parameter(0)
  %w = bf16[8,16]{{1,0}} parameter(1)
{body}
}}
"""
GEMM = """
%gemm (p: bf16[4,8], q: bf16[8,16]) -> bf16[4,16] {
  %p = bf16[4,8]{1,0} parameter(0)
  %q = bf16[8,16]{1,0} parameter(1)
  ROOT %d = bf16[4,16]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
PRODUCT = '  %y = bf16[4,16]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm\n'
FLOPS, MOVED = 2 * 4 * 8 * 16, 2 * (4 * 8 + 8 * 16 + 4 * 16)
PAIRS = 'replica_groups={{0,1},{2,3}}'


def cost(body, computations=GEMM, nodes=(0, 0, 0, 0), **options):
  text = MAIN.format(computations=computations, body=body.rstrip())
  return program_cost(text, CHIP, nodes, **options)


def test_an_instruction_takes_the_longer_of_arithmetic_and_memory():
  product = cost(PRODUCT)
  assert (product.flops, product.bytes, product.seconds) == (FLOPS, MOVED, max(FLOPS, MOVED))
  both = cost(PRODUCT + '  ROOT %z = bf16[4,16]{1,0} copy(%y)')
  assert both.seconds == product.seconds + 2 * 2 * 4 * 16
  assert both.exposed == 0 and both.collectives == ()


WRITE = """
%write (s.0: bf16[9,4,16], s.1: bf16[4,16], s.2: s32[]) -> bf16[9,4,16] {
  %s.0 = bf16[9,4,16]{2,1,0} parameter(0)
  %s.1 = bf16[4,16]{1,0} parameter(1)
  %s.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %new = bf16[1,4,16]{2,1,0} bitcast(%s.1)
  ROOT %update = bf16[9,4,16]{2,1,0} dynamic-update-slice(%s.0, %new, %s.2, %zero, %zero)
}
"""


def test_a_fusion_beside_others_moves_what_the_fusion_alone_does():
  """XLA for CUDA starts copies into the stack of a scan, and goes on with the next layer."""
  stack = '  %stack = bf16[9,4,16]{2,1,0} broadcast()\n  %i = s32[] constant(3)\n'
  operands, called = '(%stack, %y, %i)', 'kind=kLoop, calls=%write'
  alone = f'  ROOT %z = bf16[9,4,16]{{2,1,0}} fusion{operands}, {called}'
  start = '((bf16[9,4,16]{2,1,0}, bf16[4,16]{1,0}, s32[]), bf16[9,4,16]{2,1,0}, u32[])'
  beside = f"""  %start = {start} fusion-start{operands}, {called}
  ROOT %z = bf16[9,4,16]{{2,1,0}} fusion-done(%start)"""
  costs = [cost(stack + PRODUCT + part, GEMM + WRITE) for part in (alone, beside)]
  assert costs[0] == costs[1]
  index = 4
  assert costs[0].bytes == cost(stack + PRODUCT).bytes + 2 * 2 * 4 * 16 + index


# all-gather of 8 x 16 from 4 x 16: half of 256 bytes comes from the other device.
GATHER = f"""  %s = bf16[4,16]{{1,0}} slice(%w), slice={{[0:4], [0:16]}}
  %g = (bf16[4,16]{{1,0}}, bf16[8,16]{{1,0}}) all-gather-start(%s), {PAIRS}, dimensions={{0}}
WORK  %h = bf16[8,16]{{1,0}} all-gather-done(%g)
"""
SLICE, GATHERED = 2 * 2 * 4 * 16, 128


def test_a_collective_hides_behind_what_runs_until_its_end_is_awaited():
  alone = cost(GATHER.replace('WORK', ''))
  assert alone.collective_seconds == alone.exposed == GATHERED
  assert alone.seconds == SLICE + GATHERED
  (gather,) = alone.collectives
  assert (gather.kind, gather.number, gather.bytes) == ('all-gather', 1, 2 * 8 * 16)
  hidden = cost(GATHER.replace('WORK', PRODUCT))
  assert hidden.exposed == 0 and hidden.seconds == SLICE + FLOPS
  part = cost(GATHER.replace('WORK', '  %y = bf16[4,8]{1,0} negate(%x)\n'))
  assert part.exposed == 0 and part.seconds == SLICE + 128  # as long as the collective
  synchronous = GATHER.replace('dimensions={0}', 'dimensions={0}, {"is_sync":true}')
  assert cost(synchronous.replace('WORK', PRODUCT)).exposed == GATHERED


def test_collectives_of_a_device_wait_for_each_other():
  two = """  %g = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%x), PAIRS
  %r = bf16[8,16]{1,0} all-reduce-start(%w), PAIRS, to_apply=%add
  %y = bf16[4,16]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm
  %gd = bf16[8,8]{1,0} all-gather-done(%g)
  %rd = bf16[8,16]{1,0} all-reduce-done(%r)
""".replace('PAIRS', PAIRS)
  both = cost(two)
  gather, reduced = 2 * 8 * 8 / 2, 2 * 2 * 8 * 16 / 2
  assert both.collective_seconds == gather + reduced < FLOPS and both.exposed == 0
  assert cost(two.replace('%y =', '%y = bf16[4,8] bitcast(%x), ')).exposed == gather + reduced


TPU_FUSIONS = (
  GEMM
  + f"""
%begin (p: bf16[4,8]) -> (bf16[4,8], bf16[8,8]) {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  %g = bf16[8,8]{{1,0}} all-gather(%p), channel_id=7, {PAIRS}, dimensions={{0}}
  ROOT %c = (bf16[4,8]{{1,0}}, bf16[8,8]{{1,0}}) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.1 (p: bf16[4,8], q: bf16[8,8], x: bf16[4,8], w: bf16[8,16]) -> () {{
  %x = bf16[4,8]{{1,0}} parameter(2)
  %w = bf16[8,16]{{1,0}} parameter(3)
  %d = bf16[4,16]{{1,0}} convolution(%x, %w), dim_labels=bf_io->bf
  %p = bf16[4,8]{{1,0}} parameter(0)
  %q = bf16[8,8]{{1,0}} parameter(1)
  %g = bf16[8,8]{{1,0}} all-gather(%p), channel_id=7, {PAIRS}, dimensions={{0}}
  ROOT %t = (bf16[4,16]{{1,0}}, bf16[4,8]{{1,0}}, bf16[8,8]{{1,0}}) tuple(%d, %p, %g)
}}

%end (p: bf16[4,8], q: bf16[8,8]) -> bf16[8,8] {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  %q = bf16[8,8]{{1,0}} parameter(1)
  %g = bf16[8,8]{{1,0}} all-gather(%p), channel_id=7, {PAIRS}, dimensions={{0}}
  ROOT %c = bf16[8,8]{{1,0}} custom-call(%q, %g), custom_call_target="AsyncCollectiveDone"
}}
"""
)
IN_PIECES = """  %s = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) fusion(%x), kind=kCustom, calls=%begin
  %p = bf16[4,8]{1,0} get-tuple-element(%s), index=0
  %q = bf16[8,8]{1,0} get-tuple-element(%s), index=1
  %f = (bf16[4,16]{1,0}, bf16[4,8]{1,0}, bf16[8,8]{1,0}) fusion(%p, %q, %x, %w), \
kind=kOutput, calls=%async_collective_fusion.1
  %r = bf16[8,8]{1,0} get-tuple-element(%f), index=2
  %e = bf16[8,8]{1,0} fusion(%p, %r), kind=kCustom, calls=%end
"""


def test_a_collective_in_pieces_counts_once():
  """As on a TPU: it starts, goes on in a fusion with a product, and ends."""
  whole = cost(IN_PIECES, TPU_FUSIONS)
  (gather,) = whole.collectives
  assert (gather.number, gather.bytes, gather.seconds) == (1, 2 * 8 * 8, 64)
  assert whole.exposed == 0 and whole.seconds == FLOPS
  product = '  %f = bf16[4,16]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm'
  steps = IN_PIECES.splitlines(keepends=True)
  nothing_between = ''.join((*steps[:3], '  %r = bf16[8,8] bitcast(%q)\n', steps[-1], product))
  assert cost(nothing_between, TPU_FUSIONS).exposed == 64


SPARSE_CORE = (
  GEMM
  + f"""
%gather (p: bf16[4,8]) -> bf16[8,8] {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  ROOT %g = bf16[8,8]{{1,0}} all-gather(%p), {PAIRS}, dimensions={{0}}
}}

%offloaded (p: bf16[4,8]) -> bf16[8,8] {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  ROOT %c = bf16[8,8]{{1,0}} custom-call(%p), called_computations={{%gather}}
}}
"""
)


def test_a_collective_that_another_core_runs_is_hidden():
  start = '  %s = ((bf16[4,8]), bf16[8,8]{1,0}, u32[]) async-start(%x), calls=%offloaded\n'
  whole = cost(start + PRODUCT + '  %d = bf16[8,8]{1,0} async-done(%s)', SPARSE_CORE)
  assert whole.collective_seconds == 64 and whole.exposed == 0 and whole.seconds == FLOPS


def test_devices_of_a_node_share_what_leaves_it():
  alone = GATHER.replace('WORK', '')
  assert cost(alone, nodes=(0, 1, 0, 1)).collective_seconds == GATHERED / 0.25
  assert cost(alone, nodes=(0, 0, 1, 1)).collective_seconds == GATHERED
  four = alone.replace(PAIRS, 'replica_groups={{0,1,2,3}}')
  crossing = cost(four, nodes=(0, 0, 1, 1))
  # Two devices of a node, so twice the rate between nodes; the type says 8 x 16, the group 16 x 16.
  assert crossing.collective_seconds == 2 * 16 * 16 * 3 / 4 / 0.5
  assert crossing.collectives[0].crosses_nodes


SCAN = """
%update (s: bf16[5,4,16], y: bf16[4,16], i: s32[]) -> bf16[5,4,16] {
  %s = bf16[5,4,16]{2,1,0} parameter(0)
  %y = bf16[4,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %v = bf16[1,4,16]{2,1,0} bitcast(%y)
  ROOT %u = bf16[5,4,16]{2,1,0} dynamic-update-slice(%s, %v, %i, %i, %i)
}

%body (t: (s32[], bf16[5,4,16], bf16[4,16])) -> (s32[], bf16[5,4,16], bf16[4,16]) {
  %t = (s32[], bf16[5,4,16]{2,1,0}, bf16[4,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %s = bf16[5,4,16]{2,1,0} get-tuple-element(%t), index=1
  %y = bf16[4,16]{1,0} get-tuple-element(%t), index=2
  %n = bf16[5,4,16]{2,1,0} fusion(%s, %y, %i), kind=kLoop, calls=%update
  ROOT %r = (s32[], bf16[5,4,16]{2,1,0}, bf16[4,16]{1,0}) tuple(%i, %n, %y)
}

%more (t: (s32[], bf16[5,4,16], bf16[4,16])) -> pred[] {
  %t = (s32[], bf16[5,4,16]{2,1,0}, bf16[4,16]{1,0}) parameter(0)
  ROOT %m = pred[] constant(true)
}
"""
LOOP = """  %zero = s32[] constant(0)
  %y = bf16[4,16]{1,0} bitcast(%w)
  %s = bf16[5,4,16]{2,1,0} bitcast(%w)
  %t = (s32[], bf16[5,4,16]{2,1,0}, bf16[4,16]{1,0}) tuple(%zero, %s, %y)
  %l = (s32[], bf16[5,4,16]{2,1,0}, bf16[4,16]{1,0}) while(%t), condition=%more, body=%bodyKNOWN
"""


def test_loops_write_one_layer_in_place_and_run_as_often_as_they_say():
  once = 2 * 2 * 4 * 16 + 4  # a layer read, written in place, and its index
  known = ', backend_config={"known_trip_count":{"n":"5"}}'
  assert cost(LOOP.replace('KNOWN', known), SCAN, trips=7).bytes == 5 * once
  unknown = cost(LOOP.replace('KNOWN', ''), SCAN, trips=7)
  assert unknown.bytes == unknown.seconds == 7 * once
  # A collective that is open meanwhile is hidden behind the loop.
  gather = f'  %g = (bf16[4,8], bf16[8,8]) all-gather-start(%x), {PAIRS}\n'
  around = gather + LOOP.replace('KNOWN', '') + '  %h = bf16[8,8] all-gather-done(%g)'
  assert cost(around, SCAN, trips=7).exposed == 0


CUDNN = """  %o = (bf16[2,4,6,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="NAME", backend_config={"mask_type": "M", \
"intermediate_tensor_shape": {"dimensions": ["2", "4", "6", "6"]}}
"""
QUERIES = """  %q = bf16[2,6,4,8]{3,2,1,0} bitcast(%x)
  %k = bf16[2,6,2,8]{3,2,1,0} bitcast(%x)
"""
KERNEL = """  %pallas_call.1 = bf16[2,6,4,8]{3,2,1,0} custom-call(%i, %q, %k, %k), \
custom_call_target="t", metadata={op_name="jit(f)/NAME/pallas_call"}
"""
LOGITS = 2 * 4 * 6 * 6 * 8  # B H S² h


@pytest.mark.parametrize(
  ('call', 'flops'),
  [
    (CUDNN.replace('NAME', '__cudnn$fmhaSoftmax').replace('"M"', '"CAUSAL"'), 4 * LOGITS / 2),
    (CUDNN.replace('NAME', '__cudnn$fmhaSoftmax').replace('"M"', '"NO_MASK"'), 4 * LOGITS),
    (CUDNN.replace('NAME', '__cudnn$fmhaSoftmaxBackward'), 10 * LOGITS),
    (KERNEL.replace('NAME', 'flash_forward'), 4 * LOGITS / 4),
    (KERNEL.replace('NAME', 'splash_mqa_dkv_segmented_no_residuals'), 8 * LOGITS / 4),
    (KERNEL.replace('NAME', 'transpose(jvp(flash))/flash_bwd_dq'), 6 * LOGITS / 4),
    (KERNEL.replace('NAME', 'paged'), 0),
  ],
)
def test_kernels_of_attention(call, flops):
  body = QUERIES + '  %i = s32[2,6]{1,0} bitcast(%x)\n' + call
  attention = cost(body, attended=0.25)
  assert attention.flops == attention.attention_flops == flops
  assert attention.seconds == max(flops / 0.5, attention.bytes)


@pytest.mark.parametrize(
  ('call', 'flops'),
  [
    # Of TPUs: a product, a product per batch entry (a window that meets one entry at a time), and
    # a convolution of 6 positions with 3, without padding.
    ('bf16[4,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf', FLOPS),
    (
      'bf16[3,4,16]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, '
      'dim_labels=0bf_0io->0bf',
      3 * FLOPS,
    ),
    ('bf16[1,4,5] convolution(%c, %d), window={size=3}, dim_labels=b0f_0io->b0f', 2 * 4 * 3 * 10),
    (
      '(bf16[4,16]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", '
      'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}',
      FLOPS,
    ),
  ],
)
def test_other_spellings_of_products(call, flops):
  operands = """  %a = bf16[3,4,8]{2,1,0} bitcast(%x)
  %b = bf16[3,8,16]{2,1,0} bitcast(%w)
  %c = bf16[1,6,2]{2,1,0} bitcast(%x)
  %d = bf16[3,2,5]{2,1,0} bitcast(%w)
"""
  assert cost(f'{operands}  %y = {call}').flops == flops
