// The kernels of tile.h for one instruction set. Included by foreach_isa.h's rounds, so without a guard.

#include "simd.h"

namespace ce::cpu::CE_ISA {

// Classes from one vector of a tile to the next.
template <typename A, bool kAlong>
constexpr int kClassStep = kAlong ? kLanes<A> : 1;

// The lanes that exist in the vector at class c of a tile of `rows` rows.
template <typename A, bool kAlong>
CE_INLINE int lanes_at(int64_t c, int64_t end, int rows) {
  return !kAlong ? rows : end - c < kLanes<A> ? static_cast<int>(end - c) : kLanes<A>;
}

// Whether the lanes run across rows that lie along the classes, which are transposed then. Reading what is next to
// each other costs less than collecting every element for itself.
template <typename A, bool kAlong, typename Pointer>
CE_INLINE bool is_transposed(const Problem& p, const Operand<Pointer>& operand) {
  return !kAlong && operand.class_stride == 1 && p.classes <= kNarrow * kLanes<A>;
}
// Room for that: a vector for each class.
template <typename A, bool kAlong>
using Columns = Vec<A>[kAlong ? 1 : kNarrow * kLanes<A>];

// A tile of an operand of shape (rows, classes): vector c starts at class c, its lanes as many as exist. If the operand
// is transposed, an input's columns are there from the beginning; what was set of an output is written by finish().
template <typename T, bool kAlong>
struct TileView {
  using A = Acc<T>;
  T* data = nullptr;
  int64_t class_stride = 0;
  int64_t row_stride = 0;
  Vec<A>* columns = nullptr;

  template <typename Pointer>
  CE_INLINE TileView(const Problem& p, const Operand<Pointer>& operand, Tile tile, Columns<A, kAlong>& room) {
    if (!operand.data) {
      return;
    }
    data = static_cast<T*>(operand.data) + row_offset(p, tile.row, operand.strides);
    class_stride = operand.class_stride;
    row_stride = operand.strides[p.dims - 1];
    if (is_transposed<A, kAlong>(p, operand)) {
      columns = room;
      if constexpr (std::is_const_v<T>) {
        transpose_in(data, row_stride, tile.rows, p.classes, room);
      }
    }
  }
  CE_INLINE void finish(const Problem& p, Tile tile) const {
    if (!kAlong && columns) {
      transpose_out(columns, data, row_stride, tile.rows, p.classes);
    }
  }

  CE_INLINE int64_t lane_stride() const { return kAlong ? class_stride : row_stride; }
  CE_INLINE Vec<A> get(int64_t c, int count) const {
    return !kAlong && columns ? columns[c] : load(data + c * class_stride, lane_stride(), count);
  }
  CE_INLINE void set(int64_t c, int count, Vec<A> v) const {
    if (!kAlong && columns) {
      columns[c] = v;
    } else {
      store(data + c * class_stride, lane_stride(), count, v);
    }
  }
  // The same of kCount vectors, 1 or a run. Those of a run that is `dense` in memory have its own order of the lanes.
  template <int kCount>
  CE_INLINE void get(int64_t c, int count, bool dense, Vec<Acc<T>>* v) const {
    if (kCount == kRun<std::remove_const_t<T>> && kCount > 1 && dense) {
      return load_run(data + c, v);
    }
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      v[i] = get(c + i * kLanes<Acc<T>>, count);
    }
  }
  template <int kCount>
  CE_INLINE void set(int64_t c, int count, bool dense, bool streams, const Vec<Acc<T>>* v) const {
    if (kCount == kRun<T> && dense) {
      return store_run(data + c, v, streams);
    }
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      set(c + i * kLanes<Acc<T>>, count, v[i]);
    }
  }
  // The first class from c on, at most `end`, where a run is aligned in memory.
  CE_INLINE int64_t align(int64_t c, int64_t end) const {
    const auto address = reinterpret_cast<uintptr_t>(data + c);
    const int64_t aligned = c + -(address / sizeof(T)) % (kRun<T> * kLanes<Acc<T>>);
    return aligned < end ? aligned : end;
  }
  CE_INLINE T& at(int lane, int64_t c) const { return data[lane * row_stride + c * class_stride]; }
};

// The coefficients a_c of row_loss.h, but for the part that only an index target has.
template <typename T, bool kAlong>
struct Coefficients {
  using A = Acc<T>;
  const A* weight;
  TileView<const T, kAlong> probabilities;
  Smoothing<A> smoothing;

  CE_INLINE Coefficients(const Problem& p, Tile tile, Columns<A, kAlong>& room)
      : weight(static_cast<const A*>(p.weight)),
        probabilities(p, p.target_type == TargetType::kProbabilities ? p.target : Input(), tile, room),
        smoothing(smoothing_of<A>(p)) {}

  CE_INLINE Vec<A> weights(int64_t c, int count) const {
    return !weight ? broadcast(A(1)) : kAlong ? load(weight + c, 1, count) : broadcast(weight[c]);
  }
  CE_INLINE Vec<A> get(int64_t c, int count) const {
    const Vec<A> w = weights(c, count);
    return probabilities.data ? smoothing.coefficient(w, probabilities.get(c, count)) : smoothing.background(w);
  }
};

// What makes the logits of the formula of the given ones, as far as a kernel is compiled for it alone.
enum class Change { kNone, kScale, kSoftcap, kAny };

template <typename A>
struct AsGiven {
  static constexpr A scale = 1;
  explicit AsGiven(const Problem&) {}
};
template <typename A, Change kChange = Change::kAny>
struct Transformed : LogitTransform<A> {
  Softcap<A> softcap;

  explicit Transformed(const Problem& p) : Transformed(transform_of<A>(p)) {}
  explicit Transformed(LogitTransform<A> transform)
      : LogitTransform<A>(transform), softcap(transform.before_tanh(), transform.cap) {}

  CE_INLINE bool caps() const { return kChange == Change::kAny ? this->cap > 0 : kChange == Change::kSoftcap; }
};
template <typename A, Change kChange>
using Transform = std::conditional_t<kChange == Change::kNone, AsGiven<A>, Transformed<A, kChange>>;

// What is kept of an exponential for the gradient: it has the transform's slope in it, in units of unit_of_kept().
template <typename A>
CE_INLINE Vec<A> kept_exp(const AsGiven<A>&, Vec<A> e, Vec<A>) {
  return e;
}
template <typename A, Change kChange>
CE_INLINE Vec<A> kept_exp(const Transformed<A, kChange>& transform, Vec<A> e, Vec<A> z) {
  return transform.caps() ? e * ((transform.cap - z) * (transform.cap + z)) : e;
}
template <typename A>
CE_INLINE A unit_of_kept(const AsGiven<A>&) {
  return 1;
}
template <typename A, Change kChange>
CE_INLINE A unit_of_kept(const Transformed<A, kChange>& transform) {
  return transform.caps() ? 1 / (transform.cap * transform.cap) : A(1);
}

// From vectors of logits as they are given to those of the formula.
template <typename A, int kCount>
CE_INLINE void apply(const AsGiven<A>&, Vec<A> (&)[kCount]) {}
template <typename A, Change kChange, int kCount>
CE_INLINE void apply(const Transformed<A, kChange>& transform, Vec<A> (&x)[kCount]) {
  if (transform.caps()) {
    transform.softcap.apply(x);
  } else {
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      x[i] *= transform.scale;
    }
  }
}
template <typename TransformType, typename V>
CE_INLINE V applied(const TransformType& transform, V x) {
  V z[] = {x};
  apply(transform, z);
  return z[0];
}

// From the gradient of the formula's logits z, times the scale, to that of the given ones.
template <typename A>
CE_INLINE Vec<A> capped(const AsGiven<A>&, Vec<A> gradient, Vec<A>) {
  return gradient;
}
template <typename A, Change kChange>
CE_INLINE Vec<A> capped(const Transformed<A, kChange>& transform, Vec<A> gradient, Vec<A> z) {
  return transform.caps() ? gradient * transform.slope(z) : gradient;
}

template <typename A>
CE_INLINE typename Simd<A>::Mask first_lanes(int count) {
  typename Simd<A>::Mask lane;
  for (int i = 0; i < kLanes<A>; ++i) {
    lane[i] = i;
  }
  return lane < count;
}

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

// Each row's logit at its target's index; 0 where that is not one of the classes [begin, end).
template <typename T, bool kAlong>
CE_INLINE Vec<Acc<T>> target_logits(const TileView<const T, kAlong>& logits, const TileTargets<Acc<T>>& targets,
                                    int rows, int64_t begin, int64_t end) {
  T at_target[kLanes<Acc<T>>] = {};
  for (int lane = 0; lane < rows; ++lane) {
    const int64_t target = targets.index[lane];
    if (target >= begin && target < end) {
      at_target[lane] = logits.at(lane, target);
    }
  }
  return load(at_target);
}

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
void accumulate_classes(const Problem& p, Tile tile, const TileTargets<Acc<T>>& targets, int64_t begin, int64_t end,
                        Exps<Acc<T>> kept, RowState<double>* states, [[maybe_unused]] Moment<double>* moments) {
  using A = Acc<T>;
  constexpr int kStep = kClassStep<A, kAlong>;
  Columns<A, kAlong> columns, probability_columns;
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
  const int64_t bytes_ahead = sizeof(T) == 2 && !reads_in_stripes() ? 4096 : 512;
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
    if (kept.values) {
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
  for (int lane = 0; lane < tile.rows; ++lane) {
    RowState<double> row;
    row.exps.sum = kAlong ? reduce_sum<A>(sums.exps) : sums.exps[lane];
    row.exps.max = row.exps.sum == 0 ? -INFINITY : state.reference[lane];
    if (kLinear) {
      row.linear = kAlong ? reduce_sum<A>(sums.linear) : sums.linear[lane];
      row.coefficients = kAlong ? reduce_sum<A>(sums.coefficients) : sums.coefficients[lane];
    }
    const int64_t target = targets.index[lane];
    if (target >= begin && target < end) {
      row.add(targets.weight[lane] * coefficients.smoothing.keep, at_target[lane]);
    }
    if constexpr (kMoment) {
      const Moment<double> moment{kAlong ? reduce_sum<A>(sums.moment) : sums.moment[lane]};
      moments[lane] = begin == 0 ? moment : moments[lane].merge(states[lane].exps, moment, row.exps);
    }
    states[lane] = begin == 0 ? row : states[lane].merge(row);
  }
}

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

// f of what a kernel is to be compiled for: along, linear, the change, and whether it has to do with entropy. Along
// rows without coefficients, where most calls go, there are kernels of one change alone.
template <typename F>
auto pick(const Problem& p, bool along, bool entropy, F&& f) {
  constexpr Constant<true> kYes;
  constexpr Constant<false> kNo;
  const auto pick_entropy = [&](auto a, auto linear, auto change) {
    return entropy ? f(a, linear, change, kYes) : f(a, linear, change, kNo);
  };
  const auto pick_change = [&](auto a, auto linear) {
    constexpr Constant<Change::kNone> kNone;
    if constexpr (a && !linear) {
      return p.softcap > 0   ? pick_entropy(a, linear, Constant<Change::kSoftcap>())
             : transforms(p) ? pick_entropy(a, linear, Constant<Change::kScale>())
                             : pick_entropy(a, linear, kNone);
    } else {
      return entropy || transforms(p) ? pick_entropy(a, linear, Constant<Change::kAny>()) : f(a, linear, kNone, kNo);
    }
  };
  const auto pick_linear = [&](auto a) { return has_coefficients(p) ? pick_change(a, kYes) : pick_change(a, kNo); };
  return along ? pick_linear(kYes) : pick_linear(kNo);
}

template <typename T>
Accumulate<Acc<T>>* accumulate(const Problem& p, bool along) {
  return pick(p, along, p.entropy, [](auto a, auto linear, auto change, auto moment) {
    return &accumulate_classes<T, a, linear, change, moment>;
  });
}

// Compares the elements as they are given, times ±1, so that ties are exact.
template <typename T, bool kAlong>
void place_classes(const Problem& p, Tile tile, const TileTargets<Acc<T>>& targets, int64_t begin, int64_t end,
                   RowPlace<double>* places, double* logits_of_targets) {
  using A = Acc<T>;
  using Mask = typename Simd<A>::Mask;
  constexpr int kStep = kClassStep<A, kAlong>;
  Columns<A, kAlong> columns;
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
void place(const Problem& p, bool along, Tile tile, const TileTargets<Acc<T>>& targets, int64_t begin, int64_t end,
           RowPlace<double>* places, double* logits_of_targets) {
  (along ? place_classes<T, true> : place_classes<T, false>)(p, tile, targets, begin, end, places, logits_of_targets);
}

// The lanes whose rows are kept. Along a row nobody asks who has not kept it.
template <typename A, bool kAlong>
CE_INLINE typename Simd<A>::Mask kept_lanes(Tile tile, const TileTargets<A>& targets) {
  typename Simd<A>::Mask kept;
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    kept[lane] = kAlong || (lane < tile.rows && targets.kept[lane]) ? -1 : 0;
  }
  return kept;
}

// The per-row values of a tile as vectors: the one row's in every lane, or each lane its row's.
template <typename A, bool kAlong>
CE_INLINE Vec<A> spread(const A (&rows)[kMaxLanes]) {
  return kAlong ? broadcast(rows[0]) : load(rows);
}

// The gradient of one row that has none.
template <typename T>
void clear_classes(const Problem& p, Tile tile, int64_t begin, int64_t end) {
  Columns<Acc<T>, true> columns;
  const TileView<T, true> grad(p, p.grad, tile, columns);
  for (int64_t c = begin; c < end; c += kLanes<Acc<T>>) {
    grad.set(c, lanes_at<Acc<T>, true>(c, end, 1), Vec<Acc<T>>{});
  }
}

template <typename T, bool kAlong, bool kLinear, Change kChange, bool kTilted>
void gradient_classes(const Problem& p, Tile tile, const TileTargets<Acc<T>>& targets, const TileGradient<Acc<T>>& rows,
                      int64_t begin, int64_t end, Exps<Acc<T>> kept_exps) {
  if (kAlong && !targets.kept[0]) {
    return clear_classes<T>(p, tile, begin, end);
  }
  using A = Acc<T>;
  using Row = RowGradient<A>;
  constexpr int kStep = kClassStep<A, kAlong>;
  Columns<A, kAlong> columns, probability_columns;
  const TileView<const T, kAlong> logits(p, p.logits, tile, columns);
  const TileView<T, kAlong> grad(p, p.grad, tile, columns);  // takes the place of the logits that have been used
  const Coefficients<T, kAlong> coefficients(p, tile, probability_columns);
  const Transform<A, kChange> transform(p);
  const Vec<A> top = spread<A, kAlong>(rows.max);
  const Vec<A> scale = spread<A, kAlong>(rows.scale) * transform.scale;
  const Vec<A> upstream = spread<A, kAlong>(rows.upstream) * transform.scale;
  const Vec<A> tilt = spread<A, kAlong>(rows.tilt) * transform.scale;
  // What an exponential is multiplied with.
  const auto factor_at = [&](Vec<A> distance) __attribute__((always_inline)) {
    return kTilted ? scale - tilt * min(distance, broadcast(Moment<A>::kFarthest)) : scale;
  };

  // The elements at the targets' indices, read before the gradient may overwrite the logits.
  A target_coefficients[kLanes<A>] = {};
  for (int lane = 0; lane < tile.rows; ++lane) {
    target_coefficients[lane] = coefficients.smoothing.coefficient(targets.weight[lane], A(1));
  }
  T target_grad[kLanes<A>];
  const Vec<A> z_target = applied(transform, target_logits(logits, targets, tile.rows, begin, end));
  const Vec<A> target_distances[] = {top - z_target};
  const Vec<A> target_exps = ExpMinus<A, 1, kElementDegree<T>>(target_distances).get(0);
  const Vec<A> target_element =
      Row::element(target_exps, load(target_coefficients), factor_at(target_distances[0]), upstream) +
      spread<A, kAlong>(rows.log_prob) * transform.scale;
  store(target_grad, capped(transform, target_element, z_target));

  const auto kept = kept_lanes<A, kAlong>(tile, targets);
  constexpr int kVectors = kAlong && !kLinear ? kRun<T> : 1;
  constexpr int kSize = 4;
  const int lanes = kAlong ? kLanes<A> : tile.rows;
  const bool dense = kAlong && logits.class_stride == 1 && grad.class_stride == 1;
  const bool may_stream =
      p.streams_grad && kVectors == kRun<T> && p.classes * static_cast<int64_t>(sizeof(T)) >= kStreamedRow;
  const auto element = [&](Vec<A> e, Vec<A> z, Vec<A> distance, int64_t c, int count) __attribute__((always_inline)) {
    const Vec<A> factor = factor_at(distance);
    const Vec<A> of_z = kLinear ? Row::element(e, coefficients.get(c, count), factor, upstream) : e * factor;
    const Vec<A> g = capped(transform, of_z, z);
    return kAlong ? g : kept ? g : Vec<A>{};
  };
  const auto write_groups = [&](int64_t c, bool streams) __attribute__((always_inline)) {
    for (; c + kSize * kStep <= end; c += kSize * kStep) {
      Vec<A> x[kSize];
      CE_UNROLL for (int i = 0; i < kSize; i += kVectors) {
        logits.template get<kVectors>(c + i * kStep, lanes, dense, x + i);
      }
      apply(transform, x);
      Vec<A> distances[kSize];
      CE_UNROLL for (int i = 0; i < kSize; ++i) {
        distances[i] = top - x[i];
      }
      const ExpMinus<A, kSize, kElementDegree<T>> exps(distances);
      CE_UNROLL for (int i = 0; i < kSize; ++i) {
        x[i] = element(exps.get(i), x[i], distances[i], c + i * kStep, lanes);
      }
      CE_UNROLL for (int i = 0; i < kSize; i += kVectors) {
        grad.template set<kVectors>(c + i * kStep, lanes, dense, streams, x + i);
      }
    }
    return c;
  };
  const auto write_singly = [&](int64_t c, int64_t last) __attribute__((always_inline)) {
    for (; c < last; c += kStep) {
      const int count = lanes_at<A, kAlong>(c, last, tile.rows);
      const Vec<A> z = applied(transform, logits.get(c, count));
      const Vec<A> distance[] = {top - z};
      grad.set(c, count, element(ExpMinus<A, 1, kElementDegree<T>>(distance).get(0), z, distance[0], c, count));
    }
    return last;
  };
  // From the exponentials that the forward pass has kept, in its groups. Meanwhile the next row's start is fetched.
  const auto write_kept = [&](auto striped) __attribute__((always_inline)) {
    const int64_t groups = (end - begin) / (kGroup * kStep);
    A* const factors = kept_exps.references + begin / (kGroup * kStep);
    for (int64_t g = 0; g < groups; g += kLanes<A>) {
      const int count = lanes_at<A, true>(g, groups, 1);
      store(factors + g, 1, count, exp_minus<A>(top - load(factors + g, 1, count)) * (scale * unit_of_kept(transform)));
    }
    const bool streams = may_stream && grad.align(begin, end) == begin;
    constexpr int kTogether = decltype(striped)::value ? kVectors : kGroup;
    constexpr int64_t kFetched = (128 << 10) / sizeof(T);
    int64_t c = begin;
    for (int stripe = 0; stripe < kGroup / kTogether; ++stripe) {
      for (int64_t g = 0; g < groups; ++g, c += kTogether * kStep) {
        const Vec<A> factor = broadcast(factors[g]);
        Vec<A> x[kTogether];
        CE_UNROLL for (int i = 0; i < kTogether; ++i) {
          const Vec<A> e = load(kept_exps.values + c + i * kStep);
          x[i] = kLinear ? Row::element(e, coefficients.get(c + i * kStep, lanes), factor, upstream) : e * factor;
        }
        CE_UNROLL for (int i = 0; i < kTogether; i += kVectors) {
          if (c < kFetched) {
            __builtin_prefetch(logits.data + logits.row_stride + c + i * kStep, 0, 2);
          }
          grad.template set<kVectors>(c + i * kStep, lanes, true, streams, x + i);
        }
      }
    }
    if (streams) {
      finish_streaming();
    }
    return c;
  };
  int64_t c = begin;
  if (kAlong && kept_exps.values) {
    c = reads_in_stripes() ? write_kept(std::true_type()) : write_kept(std::false_type());
  } else if (dense) {
    c = write_singly(c, grad.align(c, end));
    if (may_stream) {
      c = write_groups(c, true);
      finish_streaming();
    }
  }
  write_singly(write_groups(c, false), end);
  grad.finish(p, tile);

  for (int lane = 0; lane < tile.rows; ++lane) {
    const int64_t target = targets.index[lane];
    if (target >= begin && target < end) {
      grad.at(lane, target) = target_grad[lane];
    }
  }
}

template <typename T>
WriteGradient<Acc<T>>* gradient(const Problem& p, bool along) {
  return pick(p, along, p.grad_entropy.data, [](auto a, auto linear, auto change, auto tilted) {
    return &gradient_classes<T, a, linear, change, tilted>;
  });
}

template <typename T, bool kAlong>
void sum_classes(const Problem& p, Tile tile, double* sums) {
  using A = Acc<T>;
  Columns<A, kAlong> columns;
  const Coefficients<T, kAlong> coefficients(p, tile, columns);
  Vec<A> sum = {};
  for (int64_t c = 0; c < p.classes; c += kClassStep<A, kAlong>) {
    const int count = lanes_at<A, kAlong>(c, p.classes, tile.rows);
    sum += first_lanes<A>(count) ? coefficients.get(c, count) : Vec<A>{};
  }
  for (int lane = 0; lane < tile.rows; ++lane) {
    sums[lane] = kAlong ? reduce_sum<A>(sum) : sum[lane];
  }
}

template <typename T>
void sum_coefficients(const Problem& p, bool along, Tile tile, double* sums) {
  (along ? sum_classes<T, true> : sum_classes<T, false>)(p, tile, sums);
}

template <typename T, bool kAlong>
void target_gradient_classes(const Problem& p, Tile tile, const TileGradient<Acc<T>>& rows, int64_t begin,
                             int64_t end) {
  using A = Acc<T>;
  Columns<A, kAlong> columns, probability_columns;
  const TileView<const T, kAlong> logits(p, p.logits, tile, columns);
  const TileView<T, kAlong> grad(p, p.grad, tile, columns);
  const Coefficients<T, kAlong> coefficients(p, tile, probability_columns);
  const Vec<A> top = spread<A, kAlong>(rows.max);
  const Vec<A> log_sum = spread<A, kAlong>(rows.scale);
  const Vec<A> upstream = spread<A, kAlong>(rows.upstream) * coefficients.smoothing.keep;
  const Transformed<A> transform(p);
  for (int64_t c = begin; c < end; c += kClassStep<A, kAlong>) {
    const int count = lanes_at<A, kAlong>(c, end, tile.rows);
    const Vec<A> z = applied(transform, logits.get(c, count));
    grad.set(c, count, upstream * coefficients.weights(c, count) * (log_sum - (z - top)));
  }
  grad.finish(p, tile);
}

template <typename T>
void target_gradient(const Problem& p, bool along, Tile tile, const TileGradient<Acc<T>>& rows, int64_t begin,
                     int64_t end) {
  (along ? target_gradient_classes<T, true> : target_gradient_classes<T, false>)(p, tile, rows, begin, end);
}

template <typename T, bool kAlong>
void weight_gradient_classes(const Problem& p, Tile tile, const TileGradient<Acc<T>>& rows, int64_t begin, int64_t end,
                             double* sums) {
  using A = Acc<T>;
  Columns<A, kAlong> columns, probability_columns;
  const TileView<const T, kAlong> logits(p, p.logits, tile, columns);
  Coefficients<T, kAlong> coefficients(p, tile, probability_columns);
  coefficients.weight = nullptr;
  const Transformed<A> transform(p);
  const Vec<A> top = spread<A, kAlong>(rows.max);
  const Vec<A> log_sum = spread<A, kAlong>(rows.scale);
  const Vec<A> upstream = spread<A, kAlong>(rows.upstream);
  for (int64_t c = begin; c < end; c += kClassStep<A, kAlong>) {
    const int count = lanes_at<A, kAlong>(c, end, tile.rows);
    const Vec<A> z = applied(transform, logits.get(c, count));
    const Vec<A> terms = upstream * coefficients.get(c, count) * (log_sum - (z - top));
    for (int lane = 0; lane < count; ++lane) {
      sums[c - begin + (kAlong ? lane : 0)] += terms[lane];
    }
  }
}

template <typename T>
void weight_gradient(const Problem& p, bool along, Tile tile, const TileGradient<Acc<T>>& rows, int64_t begin,
                     int64_t end, double* sums) {
  (along ? weight_gradient_classes<T, true> : weight_gradient_classes<T, false>)(p, tile, rows, begin, end, sums);
}

template <typename T, bool kAlong>
void logit_scale_gradient_classes(const Problem& p, Tile tile, const TileTargets<Acc<T>>& targets,
                                  const TileGradient<Acc<T>>& rows, int64_t begin, int64_t end, double* sum) {
  using A = Acc<T>;
  Columns<A, kAlong> columns, probability_columns;
  const TileView<const T, kAlong> logits(p, p.logits, tile, columns);
  const Coefficients<T, kAlong> coefficients(p, tile, probability_columns);
  const Transformed<A> transform(p);
  const Vec<A> top = spread<A, kAlong>(rows.max);
  const Vec<A> scale = spread<A, kAlong>(rows.scale);
  const Vec<A> upstream = spread<A, kAlong>(rows.upstream);
  const auto kept = kept_lanes<A, kAlong>(tile, targets);
  const Vec<A> tilt = spread<A, kAlong>(rows.tilt);
  Vec<A> total = {};
  for (int64_t c = begin; c < end; c += kClassStep<A, kAlong>) {
    const int count = lanes_at<A, kAlong>(c, end, tile.rows);
    const Vec<A> x = logits.get(c, count);
    const Vec<A> z = applied(transform, x);
    const Vec<A> factor = scale - tilt * min(top - z, broadcast(Moment<A>::kFarthest));
    const Vec<A> gradient =
        RowGradient<A>::element(exp_minus<A>(top - z), coefficients.get(c, count), factor, upstream);
    total += first_lanes<A>(count) & kept ? capped(transform, gradient, z) * x : Vec<A>{};
  }
  *sum += reduce_sum<A>(total);
  for (int lane = 0; lane < tile.rows; ++lane) {  // what only the index has
    const int64_t target = targets.index[lane];
    if (target >= begin && target < end) {
      const A coefficient = coefficients.smoothing.keep * targets.weight[lane];
      A x[kLanes<A>], z[kLanes<A>];
      const Vec<A> x_target = target_logits(logits, targets, tile.rows, begin, end);
      store(x, x_target);
      store(z, applied(transform, x_target));
      const A gradient = rows.log_prob[lane] - rows.upstream[lane] * coefficient;
      *sum += double(gradient) * (transform.cap > 0 ? transform.slope(z[lane]) : A(1)) * x[lane];
    }
  }
}

template <typename T>
void logit_scale_gradient(const Problem& p, bool along, Tile tile, const TileTargets<Acc<T>>& targets,
                          const TileGradient<Acc<T>>& rows, int64_t begin, int64_t end, double* sum) {
  if (targets.any_kept) {
    (along ? logit_scale_gradient_classes<T, true> : logit_scale_gradient_classes<T, false>)(p, tile, targets, rows,
                                                                                             begin, end, sum);
  }
}

template <typename T>
void scale(T* data, int64_t count, Acc<T> factor) {
  constexpr int kStep = kLanes<Acc<T>>;
  for (int64_t i = 0; i < count; i += kStep) {
    const int lanes = count - i < kStep ? static_cast<int>(count - i) : kStep;
    store(data + i, 1, lanes, load(data + i, 1, lanes) * factor);
  }
}

}  // namespace ce::cpu::CE_ISA

#include "divergence_kernels.h"
#include "pick_kernels.h"

namespace ce::cpu::CE_ISA {

template <typename T>
constexpr TileKernels<T> kTileKernels = {
    kLanes<Acc<T>>,     accumulate<T>,           gradient<T>, place<T>,   sum_coefficients<T>,    target_gradient<T>,
    weight_gradient<T>, logit_scale_gradient<T>, scale<T>,    diverge<T>, divergence_gradient<T>, gather_picks<T>,
    write_picks<T>};

}  // namespace ce::cpu::CE_ISA
