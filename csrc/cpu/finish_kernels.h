// The kernels of tile.h for the logarithms of sums, and for the losses that come from them. Included by tile_kernels.h,
// so without a guard.

namespace ce::cpu::CE_ISA {

// The logarithms of unusual numbers, each by itself: they change no bit of the others'.
__attribute__((noinline)) inline Doubles log_singly(Doubles x, Doubles logs) {
  for (int lane = 0; lane < kLanes<double>; ++lane) {
    logs[lane] = x[lane] >= 1 && x[lane] <= std::numeric_limits<double>::max() ? logs[lane] : std::log(x[lane]);
  }
  return logs;
}

// Fast where all are ≥ 1.
CE_INLINE Doubles log_of_sums(Doubles x) {
  const auto is_usual = (x >= 1) & (x <= std::numeric_limits<double>::max());
  const Doubles logs = log<double>(is_usual ? x : broadcast(1.0));
  return __builtin_expect(any_negative(~is_usual), 0) ? log_singly(x, logs) : logs;
}

inline void take_logs(double* x, int count) {
  for (int i = 0; i < count; i += kLanes<double>) {
    store(x + i, log_of_sums(load(x + i)));
  }
}

template <typename A>
void finish_rows(const TileTargets<A>& targets, const TileStates& states, const A* upstreams, A* losses,
                 TileGradient<A>& gradient) {
  for (int lane = 0; lane < kLanes<A>; lane += kLanes<double>) {
    const RowState<Doubles> rows{{load(states.max + lane), load(states.sum + lane)},
                                 load(states.linear + lane),
                                 load(states.coefficients + lane)};
    const Doubles sums = targets.any_kept ? rows.exps.sum : broadcast(1.0);
    const Doubles loss = rows.loss_of_logits(log_of_sums(sums));
    store_doubles(losses + lane, load_mask(targets.kept + lane) ? loss : Doubles{});
  }
  for (int lane = 0; upstreams && lane < kLanes<A>; ++lane) {
    const MaxSum<A> exps{A(states.max[lane]), A(states.sum[lane])};
    gradient.set(lane, make_row_gradient<A>(exps, A(states.coefficients[lane]), 0, {upstreams[lane]}));
  }
}

}  // namespace ce::cpu::CE_ISA
