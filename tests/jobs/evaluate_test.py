"""The table of an evaluation."""

from segjax.jobs import evaluate_summary


def test_figures_fit_a_page(capsys):
  estimate = {'mean': -0.5, 'low': -0.61, 'high': -0.4, 'n': 3}
  figures = {'gold': estimate, 'kl_nats': -1e-9, 'length': 10.0, 'segments': 2.0, 'eos_rate': 1.0}
  wins = {'win_rate_gold': estimate, 'lc_win_rate_score': estimate, 'repeated_4grams': 0.125}
  evaluate_summary.print_table({'before': figures | {'boundary_f1': 0.96}, 'after': figures | wins})
  out = capsys.readouterr().out
  assert '-0.500 [-0.610, -0.400]' in out
  assert 'Win rate by gold reward' in out and '0.125' in out
  assert '0.960' in out and '-0.00 ' not in out
  assert max(map(len, out.splitlines())) <= 100
