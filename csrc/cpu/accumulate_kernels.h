// The kernels of tile.h that a row's maximum, its sums and its moment come from. Included by tile_kernels.h, so without
// a guard.

namespace ce::cpu::CE_ISA {

// What the lanes add up; the moment only where it is asked for.
template <typename A, bool kMoment>
struct Sums {
  Vec<A> exps = {};
  Vec<A> linear = {};
  Vec<A> coefficients = {};
  Vec<A> moment = {};

  CE_INLINE void add(const Sums& other) {
    exps += other.exps;
    linear += other.linear;
    coefficients += other.coefficients;
    if constexpr (kMoment) {
      moment += other.moment;
    }
  }
};

// RowState in every lane, with the running maximum as the reference of the sums. Along a row all lanes share one.
//
// Rounding errors grow with the length of a chain of additions, and in one direction where the terms are alike. So
// there are three levels of sums: a group's, a block's and the piece's.
template <typename A, bool kAlong, bool kMoment>
struct Accumulator {
  static constexpr int kGroupsOfBlock = 8;

  Vec<A> reference;
  Sums<A, kMoment> block, piece;
  int groups = 0;

  // Any elements serve as the first reference, alike in all lanes along a row; but −inf would make a NaN of
  // −inf − (−inf).
  CE_INLINE explicit Accumulator(Vec<A> first) : reference(max(first, broadcast(std::numeric_limits<A>::lowest()))) {}

  CE_INLINE void close_block() {
    piece.add(block);
    block = {};
    groups = 0;
  }

  CE_INLINE void raise_to(Vec<A> top) {
    close_block();
    const Vec<A> raised = kAlong ? broadcast(reduce_max<A>(top)) : max(top, reference);
    const Vec<A> step = raised - reference;
    const Vec<A> factor = exp_minus<A>(step);
    if constexpr (kMoment) {
      piece.moment = (piece.moment - piece.exps * min(step, broadcast(Moment<A>::kFarthest))) * factor;
    }
    piece.exps *= factor;
    piece.linear = piece.coefficients == 0 ? piece.linear : piece.linear - piece.coefficients * step;
    reference = raised;
  }

  // Adds a group of vectors. Vector i of their coefficients is coefficient(i); use(i, e) gets exp(x[i] − reference).
  template <bool kLinear, int kCount, typename Coefficient, typename Use>
  CE_INLINE void add(const Vec<A> (&x)[kCount], Coefficient&& coefficient, Use&& use) {
    using Mask = typename Simd<A>::Mask;
    Vec<A> distances[kCount];
    Mask signs = {};
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      distances[i] = reference - x[i];
      signs |= bit_cast<Mask>(distances[i]);
    }
    // What is above the reference shows in the sign of its distance, as a NaN may. To collect the signs costs less than
    // to compute the maximum.
    if (__builtin_expect(any_negative(signs), 0)) {
      Vec<A> top = x[0];
      CE_UNROLL for (int i = 1; i < kCount; ++i) {
        top = max(top, x[i]);
      }
      if (any_negative(bit_cast<Mask>(top > reference))) {
        raise_to(top);
      }
      CE_UNROLL for (int i = 0; i < kCount; ++i) {
        distances[i] = reference - x[i];
      }
    }
    Sums<A, kMoment> group;
    constexpr int kInterleaved = kCount < 4 ? kCount : 4;
    CE_UNROLL for (int first = 0; first < kCount; first += kInterleaved) {
      Vec<A> d[kInterleaved];
      CE_UNROLL for (int i = 0; i < kInterleaved; ++i) {
        d[i] = distances[first + i];
        if (kLinear) {
          const Vec<A> a = coefficient(first + i);
          group.linear -= a * d[i];
          group.coefficients += a;
        }
      }
      const ExpMinus<A, kInterleaved> exps(d);
      CE_UNROLL for (int i = 0; i < kInterleaved; ++i) {
        const Vec<A> e = exps.get(i);
        group.exps += e;
        if constexpr (kMoment) {
          group.moment -= e * min(d[i], broadcast(Moment<A>::kFarthest));
        }
        use(first + i, e);
      }
    }
    block.add(group);
    if (++groups == kGroupsOfBlock) {
      close_block();
    }
  }
};

constexpr int kShort = 64;  // vectors that stay in the first cache

// The maximum of a piece's first vectors: a good first reference spares most of the raises.
template <typename T, bool kAlong>
CE_INLINE Vec<Acc<T>> first_maximum(const TileView<const T, kAlong>& logits, int64_t begin, int64_t end, int rows) {
  using A = Acc<T>;
  constexpr int kStep = kClassStep<A, kAlong>;
  constexpr int kGroup = 4;
  constexpr int kScanned = 16;
  const int lanes = kAlong ? kLanes<A> : rows;
  if (end - begin < kGroup * kStep) {
    Vec<A> top = broadcast(A(-INFINITY));
    for (int64_t c = begin; c < end; c += kStep) {
      const int count = lanes_at<A, kAlong>(c, end, rows);
      top = max(top, first_lanes<A>(count) ? logits.get(c, count) : top);
    }
    return top;
  }
  Vec<A> top[kGroup];
  CE_UNROLL for (int i = 0; i < kGroup; ++i) {
    top[i] = logits.get(begin + i * kStep, lanes);
  }
  const int64_t last = (end - begin > kScanned * kStep ? begin + kScanned * kStep : end) - kGroup * kStep;
  for (int64_t c = begin; c < last;) {
    c = last - c < kGroup * kStep ? last : c + kGroup * kStep;  // the last group overlaps the one before
    CE_UNROLL for (int i = 0; i < kGroup; ++i) {
      top[i] = max(top[i], logits.get(c + i * kStep, lanes));
    }
  }
  return max(max(top[0], top[1]), max(top[2], top[3]));
}

template <typename T, bool kAlong, bool kLinear, Change kChange, bool kMoment>
void accumulate_classes(const Problem& p, const Tile& tile, const TileTargets<Acc<T>>& targets, int64_t begin,
                        int64_t end, Exps<Acc<T>> kept, TileStates& states, [[maybe_unused]] Moment<double>* moments) {
  using A = Acc<T>;
  constexpr int kStep = kClassStep<A, kAlong>;
  Room<A, kAlong> columns, probability_columns;
  const TileView<const T, kAlong> logits(p, p.logits, tile, columns);
  const Coefficients<T, kAlong> coefficients(p, tile, probability_columns);
  const int lanes = kAlong ? kLanes<A> : tile.rows;

  const Transform<A, kChange> transform(p);
  const Vec<A> first = first_maximum<T, kAlong>(logits, begin, end, tile.rows);
  Accumulator<A, kAlong, kMoment> state(applied(transform, kAlong ? broadcast(reduce_max<A>(first)) : first));
  int64_t c = begin;
  constexpr int kVectors = kAlong && !kLinear ? kRun<T> : 1;
  // Prefetched is the next row while a short one is computed, and what follows in a long one.
  const bool is_short = end - begin <= kShort * kStep;
  const int64_t bytes_ahead = reads_in_stripes() ? 512 : kBytesAhead;
  const int64_t ahead = is_short ? logits.row_stride : bytes_ahead / sizeof(T);
  // A group's runs of vectors are neighbours, or come from as many stripes of the piece.
  const auto add_groups = [&](auto group, auto dense, auto striped, auto keeps) __attribute__((always_inline)) {
    constexpr int kSize = decltype(group)::value;
    constexpr int kRunStep = kVectors * kStep;
    const int64_t groups = (end - c) / (kSize * kStep);
    const int64_t stripe = striped ? groups * kRunStep : kRunStep;
    const int64_t first = c;
    for (int64_t g = 0; g < groups; ++g) {
      c = first + g * (striped ? kRunStep : kSize * kStep);
      Vec<A> x[kSize];
      const T* const from = logits.data + c;
      CE_UNROLL for (int i = 0; i < kSize / kVectors; ++i) {
        if (dense) {
          __builtin_prefetch(from + i * stripe + ahead);
        }
        if constexpr (!decltype(dense)::value) {
          logits.template get<kVectors>(c + i * stripe, lanes, false, x + i * kVectors);
        } else if constexpr (kVectors > 1) {
          load_run(from + i * stripe, x + i * kVectors);
        } else {
          x[i] = load(from + i * stripe);
        }
      }
      apply(transform, x);
      state.template add<kLinear>(
          x, [&](int i) __attribute__((always_inline)) { return coefficients.get(c + i * stripe, lanes); },
          [&](int i, Vec<A> e) __attribute__((always_inline)) {
            if (keeps) {
              store(kept.values + c + i / kVectors * stripe + i % kVectors * kStep, kept_exp(transform, e, x[i]));
            }
          });
      if (keeps) {
        kept.references[begin / (kSize * kStep) + g] = state.reference[0];
      }
    }
    c = first + groups * kSize * kStep;
  };
  constexpr std::integral_constant<int, kGroup> kEight;
  constexpr std::integral_constant<int, 4> kFour;
  constexpr std::true_type kDense, kStriped, kKept;
  constexpr std::false_type kNot;
  if (kAlong && logits.class_stride == 1) {
    if (!kMoment && kept.values) {
      reads_in_stripes() ? add_groups(kEight, kDense, kStriped, kKept) : add_groups(kEight, kDense, kNot, kKept);
    } else {
      reads_in_stripes() ? add_groups(kEight, kDense, kStriped, kNot) : add_groups(kEight, kDense, kNot, kNot);
    }
    add_groups(kFour, kDense, kNot, kNot);
  } else {
    add_groups(kFour, kNot, kNot, kNot);
  }
  if (c < end) {  // less than four vectors, the last not full
    constexpr int kSize = 4;
    Vec<A> x[kSize];
    CE_UNROLL for (int i = 0; i < kSize; ++i) {
      const int64_t at = c + i * kStep;
      x[i] = broadcast(A(-INFINITY));
      if (at < end) {
        const int count = lanes_at<A, kAlong>(at, end, tile.rows);
        x[i] = first_lanes<A>(count) ? applied(transform, logits.get(at, count)) : x[i];
      }
    }
    state.template add<false>(
        x, [](int) __attribute__((always_inline)) { return Vec<A>{}; },
        [](int, Vec<A>) __attribute__((always_inline)) {});
    for (int i = 0; kLinear && c + i * kStep < end; ++i) {
      const int count = lanes_at<A, kAlong>(c + i * kStep, end, tile.rows);
      const auto valid = first_lanes<A>(count);
      const Vec<A> a = valid ? coefficients.get(c + i * kStep, count) : Vec<A>{};
      state.block.linear += valid ? a * (x[i] - state.reference) : Vec<A>{};
      state.block.coefficients += a;
    }
  }
  state.close_block();
  const auto& sums = state.piece;
  A at_target[kLanes<A>];
  store(at_target, applied(transform, target_logits(logits, targets, tile.rows, begin, end)));
  [[maybe_unused]] const auto put_moment = [&](int lane, A moment, const MaxSum<double>& row) {
    const Moment<double> found{moment};
    moments[lane] = begin == 0 ? found : moments[lane].merge(states.exps(lane), found, row);
  };
  const A keep = coefficients.smoothing.keep;
  if constexpr (kAlong) {
    RowState<double> row;
    row.exps.sum = reduce_sum<A>(sums.exps);
    row.exps.max = row.exps.sum == 0 ? -INFINITY : state.reference[0];
    if (kLinear) {
      row.linear = reduce_sum<A>(sums.linear);
      row.coefficients = reduce_sum<A>(sums.coefficients);
    }
    if (targets.index[0] >= begin && targets.index[0] < end) {
      row.add(targets.weight[0] * keep, at_target[0]);
    }
    if constexpr (kMoment) {
      put_moment(0, reduce_sum<A>(sums.moment), row.exps);
    }
    states.set(0, begin == 0 ? row : states.get(0).merge(row));
  } else {
    A top[kLanes<A>], exps[kLanes<A>], linear[kLanes<A>], row_coefficients[kLanes<A>], target_coefficients[kLanes<A>];
    store(top, sums.exps == 0 ? broadcast(A(-INFINITY)) : state.reference);
    store(exps, sums.exps);
    store(linear, sums.linear);
    store(row_coefficients, sums.coefficients);
    store(target_coefficients, load(targets.weight) * keep);
    for (int lane = 0; kMoment && lane < tile.rows; ++lane) {
      put_moment(lane, sums.moment[lane], {top[lane], exps[lane]});
    }
    const auto put = [&](TileStates& into) {
      for (int lane = 0; lane < kLanes<A>; lane += kLanes<double>) {
        const RowState<Doubles> others{{load_doubles(top + lane), load_doubles(exps + lane)},
                                       load_doubles(linear + lane),
                                       load_doubles(row_coefficients + lane)};
        RowState<Doubles> row = others;
        row.add(load_doubles(target_coefficients + lane), load_doubles(at_target + lane));
        Int64s index;
        __builtin_memcpy(&index, targets.index + lane, sizeof(index));
        const auto has_target = (index >= begin) & (index < end);
        store(into.max + lane, row.exps.max);
        store(into.sum + lane, row.exps.sum);
        store(into.linear + lane, has_target ? row.linear : others.linear);
        store(into.coefficients + lane, has_target ? row.coefficients : others.coefficients);
      }
    };
    if (begin == 0) {
      put(states);
    } else {
      TileStates found;
      found.clear();
      put(found);
      for (int lane = 0; lane < tile.rows; ++lane) {
        states.set(lane, states.get(lane).merge(found.get(lane)));
      }
    }
  }
}

template <typename T>
Accumulate<Acc<T>>* accumulate(const Problem& p, bool along) {
  return specialize(p, along, p.entropy, [](auto a, auto linear, auto change, auto moment) {
    return &accumulate_classes<T, a, linear, change, moment>;
  });
}

}  // namespace ce::cpu::CE_ISA
