// The kernels of tile.h for targets that pick some classes of a row. Included by tile_kernels.h, so without a guard.

namespace ce::cpu::CE_ISA {

template <typename T>
void gather_picks(const Problem& p, int64_t row) {
  using A = Acc<T>;
  const T* const logits = static_cast<const T*>(p.logits.data) + row_offset(p, row, p.logits.strides);
  const Transformed<A> transform(p);
  const Picks<A> picks(p, row);
  Vec<A> mass = {}, negative_entropies = {};
  Vec<A> top = broadcast(A(-INFINITY));
  for (int64_t first = 0; first < p.picks; first += kLanes<A>) {
    const int count = lanes_at<A, true>(first, p.picks, 1);
    T given[kLanes<A>] = {};
    A probabilities[kLanes<A>] = {};
    for (int lane = 0; lane < count; ++lane) {
      given[lane] = logits[picks.index(first + lane) * p.logits.class_stride];
      probabilities[lane] = picks.probability(first + lane);
    }
    const Vec<A> z = applied(transform, load(given)), q = load(probabilities);
    mass += q;
    if (p.kappa != 0) {
      negative_entropies += q * log<A>(q > 0 ? q : broadcast(A(1)));
    }
    top = max(top, first_lanes<A>(count) ? z : top);
    store(picks.logits + first, 1, count, z);
    store(picks.coefficients + first, 1, count, q);
  }
  PickedRow<A> found(reduce_sum<A>(mass), reduce_sum<A>(negative_entropies), p.picks, p.classes, p.spreads,
                     p.kappa != 0);
  found.state.exps.max = reduce_max<A>(top);
  const Vec<A> reference = broadcast(found.state.exps.reference());
  Vec<A> linear = {}, coefficients = {};
  for (int64_t first = 0; first < p.picks; first += kLanes<A>) {
    const int count = lanes_at<A, true>(first, p.picks, 1);
    const Vec<A> a = first_lanes<A>(count) ? load(picks.coefficients + first, 1, count) - found.background : Vec<A>{};
    const Vec<A> z = load(picks.logits + first, 1, count);
    linear += PickedRow<A>::adds_nothing(a, z) ? Vec<A>{} : a * (z - reference);
    coefficients += a;
    store(picks.coefficients + first, 1, count, a);
  }
  found.state.linear = reduce_sum<A>(linear);
  found.state.coefficients = reduce_sum<A>(coefficients);
  picks.row = found;
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
