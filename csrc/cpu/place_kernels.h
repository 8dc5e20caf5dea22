// The kernels of tile.h for argmax, rank and the targets' logits. Included by tile_kernels.h, so without a guard.

namespace ce::cpu::CE_ISA {

// Compares the elements as they are given, times ±1, so that ties are exact.
template <typename T, bool kAlong>
void place_classes(const Problem& p, const Tile& tile, const TileTargets<Acc<T>>& targets, int64_t begin, int64_t end,
                   RowPlace<double>* places, double* logits_of_targets) {
  using A = Acc<T>;
  using Mask = typename Simd<A>::Mask;
  constexpr int kStep = kClassStep<A, kAlong>;
  Room<A, kAlong> columns;
  const TileView<const T, kAlong> logits(p, p.logits, tile, columns);
  const A order = order_of_logits<A>(p);
  const Vec<A> z = applied(Transformed<A>(p), target_logits(logits, targets, tile.rows, begin, end));
  T of_targets[kLanes<A>] = {};
  Mask target_class = {};
  for (int lane = 0; lane < tile.rows; ++lane) {
    const int64_t target = targets.index[lane];
    if (target < 0) {
      continue;
    }
    of_targets[lane] = logits.at(lane, target);
    target_class[lane] = target < begin ? -1 : target < end ? target - begin : kPiece;
    if (target >= begin && target < end) {
      logits_of_targets[lane] = z[lane];
    }
  }
  if (!p.argmax && !p.rank) {
    return;
  }
  Vec<A> target_y = load(of_targets) * order;
  Mask lanes = {};
  for (int lane = 0; kAlong && lane < kLanes<A>; ++lane) {
    lanes[lane] = lane;
    target_y[lane] = target_y[0];
    target_class[lane] = target_class[0];
  }
  Vec<A> best = broadcast(A(-INFINITY));
  Mask argmax = {}, rank = {};
  for (int64_t c = begin; c < end; c += kStep) {
    const int count = lanes_at<A, kAlong>(c, end, tile.rows);
    const Mask exists = first_lanes<A>(count);
    const Vec<A> y = logits.get(c, count) * order;
    const Mask classes = lanes + static_cast<int32_t>(c - begin);
    const Mask is_better = (y > best) & exists;
    best = is_better ? y : best;
    argmax = is_better ? classes : argmax;
    rank -= ~(y < target_y) & ((classes < target_class) | (y != target_y)) & exists;  // as RowPlace::is_before
  }
  for (int lane = 0; lane < (kAlong ? kLanes<A> : tile.rows); ++lane) {
    RowPlace<double>& place = places[kAlong ? 0 : lane];
    place = place.merge({best[lane], begin + argmax[lane], rank[lane]});
  }
}

template <typename T>
void place(const Problem& p, bool along, const Tile& tile, const TileTargets<Acc<T>>& targets, int64_t begin,
           int64_t end, RowPlace<double>* places, double* logits_of_targets) {
  (along ? place_classes<T, true> : place_classes<T, false>)(p, tile, targets, begin, end, places, logits_of_targets);
}

}  // namespace ce::cpu::CE_ISA
