// The kernels of tile.h for targets that pick some classes of a row. Included by tile_kernels.h, so without a guard.

namespace ce::cpu::CE_ISA {

template <typename T>
void gather_picks(const Problem& p, int64_t row) {
  using A = Acc<T>;
  const T* const logits = static_cast<const T*>(p.logits.data) + row_offset(p, row, p.logits.strides);
  const Transformed<A> transform(p);
  const Picks<A> picks(p, row);
  A mass = 0, negative_entropies = 0;
  for (int64_t j = 0; j < p.picks; ++j) {
    mass += picks.probability(j);
    negative_entropies += PickedRow<A>::negative_entropy(picks.probability(j));
  }
  picks.row = PickedRow<A>(mass, negative_entropies, p.picks, p.classes, p.spreads, p.kappa != 0);
  for (int64_t first = 0; first < p.picks; first += kLanes<A>) {
    const int count = lanes_at<A, true>(first, p.picks, 1);
    T given[kLanes<A>] = {};
    for (int lane = 0; lane < count; ++lane) {
      given[lane] = logits[picks.index(first + lane) * p.logits.class_stride];
    }
    store(picks.logits + first, 1, count, applied(transform, load(given)));
  }
  for (int64_t j = 0; j < p.picks; ++j) {
    picks.coefficients[j] = picks.row.add(picks.probability(j), picks.logits[j]);
  }
}

template <typename T>
void write_picks(const Problem& p, int64_t row, RowGradient<Acc<T>> gradient) {
  using A = Acc<T>;
  T* const grad = static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides);
  const Picks<A> picks(p, row);
  for (int64_t j = 0; j < p.picks; ++j) {
    PickTag<T>::write(place_of(picks, grad, j), j);
  }
  merge_repeated(picks, grad);
  const Transformed<A> transform(p);
  const Vec<A> top = broadcast(gradient.max), scale = broadcast(gradient.scale * transform.scale);
  const Vec<A> upstream = broadcast(gradient.upstream * transform.scale);
  for (int64_t first = 0; first < p.picks; first += kLanes<A>) {
    const int count = lanes_at<A, true>(first, p.picks, 1);
    const Vec<A> z = load(picks.logits + first, 1, count);
    const Vec<A> a = load(picks.coefficients + first, 1, count) + picks.row.background;
    T results[kLanes<A>];
    store(results, capped(transform, RowGradient<A>::element(exp_minus<A>(top - z), a, scale, upstream), z));
    for (int lane = 0; lane < count; ++lane) {
      *place_of(picks, grad, first + lane) = results[lane];
    }
  }
}

}  // namespace ce::cpu::CE_ISA
