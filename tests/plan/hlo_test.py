"""The reader of compiled programs, on small texts of the forms that the compilers print."""

import textwrap

import pytest

from segjax.plan import hlo
from segjax.plan.hlo_traffic import Collective, TrafficReader


def program(text):
  return hlo.parse(textwrap.dedent(text).strip())


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('bf16[8,128]{1,0}', 2048),
    ('f32[]', 4),
    ('pred[3]', 3),
    ('s4[16]{0}', 8),
    ('f8e4m3fn[10]', 10),
    ('(s32[], bf16[2,2]{1,0:T(8,128)(2,1)}, /*index=5*/u64[2])', 4 + 8 + 16),
    ('f32[64,64]{1,0:T(8,128)S(1)}', 0),  # the vector memory of a TPU
    ('token[]', 0),
  ],
)
def test_bytes_of_types(text, expected):
  assert hlo.num_bytes(text) == expected
  in_vector_memory = 64 * 64 * 4 if 'S(1)' in text else 0
  assert hlo.num_bytes(text, everywhere=True) == expected + in_vector_memory


GROUPS = {
  'replica_groups={{0,1},{2,3}}, use_global_device_ids=true': [[0, 1], [2, 3]],
  'replica_groups=[2,2]<=[4], to_apply=%add': [[0, 1], [2, 3]],
  'replica_groups=[2,2]<=[2,2]T(1,0)': [[0, 2], [1, 3]],
  'source_target_pairs={{0,1},{1,2},{2,0}}': [[0, 1], [1, 2], [2, 0]],
  'replica_groups={}, channel_id=1': [[0, 1, 2, 3]],
  "replica_groups=mesh['a'=2,'b'=2] {'b'}, channel_id=1": [[0, 1], [2, 3]],
  "replica_groups=mesh['a'=2,'b'=2] {'a'}": [[0, 2], [1, 3]],
  "replica_groups=mesh['a'=2,'b'=2] {'a','b'}": [[0, 1, 2, 3]],
  "replica_groups=mesh['a'=8] {'a':(2)2}": [[0, 2], [1, 3], [4, 6], [5, 7]],
  "replica_groups=mesh['a'=8] {'a':(1)2}": [[0, 4], [1, 5], [2, 6], [3, 7]],
  "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}": [[0, 2], [1, 3]],
  "replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}": [[3, 1], [2, 0]],
}


@pytest.mark.parametrize(('attributes', 'expected'), GROUPS.items(), ids=range(len(GROUPS)))
def test_groups_of_devices(attributes, expected):
  assert hlo.device_groups(attributes, 4) == expected


def test_lines_are_parsed():
  parsed = program("""
    HloModule jit_f, is_scheduled=true

    %add.1 (a: f32[], b: f32[]) -> f32[] {
      %a = f32[] parameter(0)
      %b = f32[] parameter(1)
      ROOT %c = f32[] add(%a, %b), metadata={op_name="jit(f)/add"}
    }

    ENTRY %main.2 (x: f32[4]) -> (f32[4], f32[]) {
      %x = f32[4]{0:T(128)(2,1)} parameter(0), metadata={op_name="x"}
      %zero = f32[] constant(0)
      %sum = f32[] reduce(%x, %zero), dimensions={0}, to_apply=%add.1
      ROOT %both = (f32[4]{0}, /*index=1*/f32[]) tuple(%x, %sum)
    }
  """)
  assert parsed.entry == 'main.2' and set(parsed.computations) == {'add.1', 'main.2'}
  main = parsed.computations['main.2']
  assert [i.opcode for i in main.values()] == ['parameter', 'constant', 'reduce', 'tuple']
  assert main['sum'].operands == ('x', 'zero') and main['sum'].called == ('add.1',)
  assert hlo.root(main).operands == ('x', 'sum') and main['x'].literal == '0'
  with pytest.raises(ValueError, match='no loop'):
    hlo.step_loop(parsed)


# A loop over steps: weights [1024, 1024] and a cache [64, 1024, 4] of four layers, scanned.
LOOP = """
HloModule jit_chunk

%product (p.0: f32[8,1024], p.1: f32[4,1024,1024], p.2: s32[]) -> f32[8,1024] {
  %p.0 = f32[8,1024]{1,0} parameter(0)
  %p.1 = f32[4,1024,1024]{2,1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %part = f32[1,1024,1024]{2,1,0} dynamic-slice(%p.1, %p.2, %zero, %zero)
  %view = f32[1024,1024]{1,0} bitcast(%part)
  ROOT %dot = f32[8,1024]{1,0} dot(%p.0, %view)
}

%write (q.0: f32[4,64,1024], q.1: f32[1,8,1024], q.2: s32[]) -> f32[4,64,1024] {
  %q.0 = f32[4,64,1024]{2,1,0} parameter(0)
  %q.1 = f32[1,8,1024]{2,1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  ROOT %update = f32[4,64,1024]{2,1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %q.2, %q.2)
}

%copied (r.0: f32[4,1024,1024], r.1: s32[]) -> f32[1,1024,1024] {
  %r.0 = f32[4,1024,1024]{2,1,0} parameter(0)
  %r.1 = s32[] parameter(1)
  ROOT %slice = f32[1,1024,1024]{2,1,0} dynamic-slice(%r.0, %r.1, %r.1, %r.1)
}

%layer (state: STATE) -> STATE {
  %state = STATE parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,1024]{1,0} get-tuple-element(%state), index=1
  %w = f32[4,1024,1024]{2,1,0} get-tuple-element(%state), index=2
  %cache = f32[4,64,1024]{2,1,0} get-tuple-element(%state), index=3
  LAYER
  %new = f32[1,8,1024]{2,1,0} bitcast(%y)
  %cache.2 = f32[4,64,1024]{2,1,0} fusion(%cache, %new, %i), kind=kLoop, calls=%write
  %attended = f32[8,1024]{1,0} custom-call(%y, %cache.2), custom_call_target="paged"
  ROOT %next = STATE tuple(%i, %attended, %w, %cache.2)
}

%more (state.2: STATE) -> pred[] {
  %state.2 = STATE parameter(0)
  %count = s32[] get-tuple-element(%state.2), index=0
  %four = s32[] constant(4)
  ROOT %lt = pred[] compare(%count, %four), direction=LT
}

%step (state.3: STATE) -> STATE {
  %state.3 = STATE parameter(0)
  ROOT %layers = STATE while(%state.3), condition=%more, body=%layer
}

%active (state.4: STATE) -> pred[] {
  %state.4 = STATE parameter(0)
  %n = s32[] get-tuple-element(%state.4), index=0
  %c = s32[] constant(16)
  %below = pred[] compare(%n, %c), direction=LT
  ROOT %and = pred[] and(%below, %below)
}

ENTRY %main (x.0: f32[8,1024], w.0: f32[4,1024,1024], cache.0: f32[4,64,1024]) -> f32[8,1024] {
  %x.0 = f32[8,1024]{1,0} parameter(0)
  %w.0 = f32[4,1024,1024]{2,1,0} parameter(1)
  %cache.0 = f32[4,64,1024]{2,1,0} parameter(2)
  %none = s32[] constant(0)
  %cast = f32[4,1024,1024]{2,1,0} copy(%w.0)
  %first = STATE tuple(%none, %x.0, %cast, %cache.0)
  %steps = STATE while(%first), condition=%active, body=%step
  ROOT %result = f32[8,1024]{1,0} get-tuple-element(%steps), index=1
}
""".replace('STATE', '(s32[], f32[8,1024]{1,0}, f32[4,1024,1024]{2,1,0}, f32[4,64,1024]{2,1,0})')
READ_IN_PLACE = '%y = f32[8,1024]{1,0} fusion(%x, %w, %i), kind=kCustom, calls=%product'
COPIED_FIRST = """%slice.1 = f32[1,1024,1024]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%copied
  %flat = f32[1024,1024]{1,0} bitcast(%slice.1)
  %y = f32[8,1024]{1,0} dot(%x, %flat)"""
ROW, WEIGHT, LAYERS, PAGES = 4 * 8 * 1024, 4 * 2**20, 4, 1000


def traffic(layer, **options):
  text = LOOP.replace('LAYER', layer)
  return TrafficReader(text, [0], {'f32[4,64,1024]': PAGES}, **options)


def test_a_step_reads_slices_and_writes_updates():
  """Four layers: a slice of the weights, one row written, the live pages read."""
  reader = traffic(READ_IN_PLACE)
  index = 4
  product, update = ROW + WEIGHT + index + ROW, ROW + index + ROW
  assert reader.step().moved == LAYERS * (product + update + (ROW + PAGES + ROW))
  assert reader.step().copied == 0 and reader.step().collectives == []
  # The copy before the loop is no part of a step.
  assert reader.outside().moved == 2 * LAYERS * WEIGHT == 2 * reader.outside().copied


def test_a_slice_of_other_tiles_is_read_alone():
  """The product of int8 weights on a TPU: tiles change in a fusion inside its fusion."""
  tiles = """%tiles (t.0: f32[4,1024,1024]) -> f32[4,1024,1024] {
  %t.0 = f32[4,1024,1024]{2,1,0} parameter(0)
  ROOT %t.1 = f32[4,1024,1024]{2,1,0} copy(%t.0)
}

%product ("""
  tiled = '%tiled = f32[4,1024,1024]{2,1,0} fusion(%p.1), kind=kLoop, calls=%tiles'
  text = LOOP.replace('%product (', tiles).replace('LAYER', READ_IN_PLACE)
  text = text.replace('%zero = s32[] constant(0)', f'{tiled}\n  %zero = s32[] constant(0)')
  text = text.replace('dynamic-slice(%p.1,', 'dynamic-slice(%tiled,')
  step = TrafficReader(text, [0], {'f32[4,64,1024]': PAGES}).step()
  assert (step.moved, step.copied) == (traffic(READ_IN_PLACE).step().moved, 0)


def test_results_stay_in_the_cache_of_a_gpu():
  step = traffic(READ_IN_PLACE, cache=ROW).step()
  # Of %y: written and read twice. The loop's own x and the row that is written to its cache are
  # in the main memory.
  assert step.cached == LAYERS * 3 * ROW + LAYERS * ROW
  assert step.moved + step.cached == traffic(READ_IN_PLACE).step().moved


def test_a_copied_slice_is_read_written_and_read_again():
  reader = traffic(COPIED_FIRST, cache=2**30)
  assert reader.step().copied == LAYERS * WEIGHT
  saved = traffic(READ_IN_PLACE, cache=2**30).step().moved
  assert reader.step().moved == saved + 2 * LAYERS * WEIGHT


def test_elementwise_work_on_weights_is_a_copy():
  """Another scale, or a cast, of what no step changes; the same on what a step changes is not."""
  scaled = '%wide = f32[4,1024,1024]{2,1,0} multiply(%w, %w)\n  ' + READ_IN_PLACE
  assert traffic(scaled).step().copied == LAYERS * LAYERS * WEIGHT
  added = '%wide = f32[4,64,1024]{2,1,0} add(%cache, %cache)\n  ' + READ_IN_PLACE
  assert traffic(added).step().copied == 0
  moved = '%wide = f32[4,64,1024]{2,1,0} copy(%cache)\n  ' + READ_IN_PLACE
  assert traffic(moved).step().copied == LAYERS * 4 * 64 * 1024 * 4


COLLECTIVES = """%y.0 = f32[8,1024]{1,0} fusion(%x, %w, %i), kind=kCustom, calls=%product
  %y.1 = f32[8,1024]{1,0} all-reduce-start(%y.0), replica_groups={{0,1},{2,3}}, to_apply=%more
  %y.2 = f32[8,1024]{1,0} all-reduce-done(%y.1)
  %y = f32[8,1024]{1,0} all-reduce(%y.2), replica_groups={{0,2},{1,3}}, to_apply=%more
  %g = (f32[2]{0}, f32[4]{0}) all-gather-start(%i), replica_groups={{0,1},{2,3}}"""


def test_collectives_and_nodes():
  reader = TrafficReader(LOOP.replace('LAYER', COLLECTIVES), [0, 0, 1, 1])
  assert reader.step().collectives == [
    Collective('all-reduce', LAYERS * ROW, LAYERS, crosses_nodes=False),
    Collective('all-reduce', LAYERS * ROW, LAYERS, crosses_nodes=True),
    Collective('all-gather', LAYERS * 2 * 4, LAYERS, crosses_nodes=False),
  ]


@pytest.mark.parametrize(
  ('condition', 'attributes', 'expected'),
  [
    ('compare(%i, %n), direction=LT', '', 3),
    ('compare(%i, %n), direction=NE', '', None),
    ('and(%i, %n)', 'backend_config={"known_trip_count":{"n":"24"}}', 24),
    ('and(%i, %n)', '', None),
  ],
)
def test_trip_counts(condition, attributes, expected):
  parsed = program(f"""
    %c (s: s32[]) -> pred[] {{
      %i = s32[] parameter(0)
      %n = s32[] constant(3)
      ROOT %t = pred[] {condition}
    }}

    ENTRY %main (s: s32[]) -> s32[] {{
      %s = s32[] parameter(0)
      ROOT %w = s32[] while(%s), condition=%c, body=%c, {attributes}
    }}
  """)
  assert parsed.trip_count(hlo.root(parsed.computations['main'])) == expected
  assert hlo.host_waits(parsed) == (expected is None)


def test_the_host_waits_for_a_branch():
  parsed = program("""
    %c (s: s32[]) -> s32[] {
      ROOT %s = s32[] parameter(0)
    }

    ENTRY %main (i: s32[]) -> s32[] {
      %i = s32[] parameter(0)
      ROOT %r = s32[] conditional(%i, %i, %i), branch_computations={%c, %c}
    }
  """)
  assert hlo.host_waits(parsed) == 1


def test_a_loop_that_is_unrolled_counts_in_larger_steps():
  """As TPU programs gather a matrix piece by piece; a kernel's metadata breaks its line."""
  parsed = program("""
    %c (s: (s32[], s32[])) -> pred[] {
      %s = (s32[], s32[]) parameter(0)
      %i = s32[] get-tuple-element(%s), index=1
      %n = s32[] constant(7)
      ROOT %t = pred[] compare(%i, %n), direction=LT
    }

    %b (s: (s32[], s32[])) -> (s32[], s32[]) {
      %s = (s32[], s32[]) parameter(0)
      %k = s32[] custom-call(%s), frontend_attributes={kernel_metadata={
    "block": 512
    }}, metadata={op_name="kernel"}
      %i = s32[] get-tuple-element(%s), index=1
      %two = s32[] constant(2)
      %j = s32[] add(%i, %two)
      ROOT %t = (s32[], s32[]) tuple(%k, %j)
    }

    ENTRY %main (s: (s32[], s32[])) -> (s32[], s32[]) {
      %s = (s32[], s32[]) parameter(0)
      ROOT %w = (s32[], s32[]) while(%s), condition=%c, body=%b
    }
  """)
  assert parsed.trip_count(hlo.root(parsed.computations['main'])) == 4
  assert 'op_name="kernel"' in parsed.computations['b']['k'].attributes
