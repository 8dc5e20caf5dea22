// The kernels of tile.h for divergences from a teacher. Included by tile_kernels.h, so without a guard.

namespace ce::cpu::CE_ISA {

// A tile of one of the two operands, as the formulas have it.
template <typename T, bool kAlong>
struct Side {
  using A = Acc<T>;
  TileView<const T, kAlong> view;
  Transformed<A> transform;

  CE_INLINE Side(const Problem& p, const Input& operand, LogitTransform<A> to_formula, const Tile& tile,
                 Room<A, kAlong>& room)
      : view(p, operand, tile, room), transform(to_formula) {}

  template <int kRunOf, int kCount>
  CE_INLINE void get(int64_t c, int count, bool dense, Vec<A> (&z)[kCount]) const {
    CE_UNROLL for (int i = 0; i < kCount; i += kRunOf) {
      view.template get<kRunOf>(c + i * kClassStep<A, kAlong>, count, dense, z + i);
    }
    apply(transform, z);
  }
  CE_INLINE Vec<A> get(int64_t c, int count) const { return applied(transform, view.get(c, count)); }

  // A first reference of the sums; −inf would make a NaN of −inf − (−inf).
  CE_INLINE Vec<A> first_reference(int64_t begin, int64_t end, int rows) const {
    const Vec<A> first = first_maximum<T, kAlong>(view, begin, end, rows);
    const Vec<A> z = applied(transform, kAlong ? broadcast(reduce_max<A>(first)) : first);
    return max(z, broadcast(std::numeric_limits<A>::lowest()));
  }
};

template <typename T, bool kAlong>
struct Sides {
  using A = Acc<T>;
  Room<A, kAlong> logits_room, teacher_room;
  const Side<T, kAlong> logits, teacher;

  CE_INLINE Sides(const Problem& p, const Tile& tile)
      : logits(p, p.logits, transform_of<A>(p), tile, logits_room),
        teacher(p, p.target, teacher_transform_of<A>(p), tile, teacher_room) {}
};

// RowDivergence in every lane, relative to references that are at least the maxima. Like Accumulator in its levels of
// sums.
template <typename A, bool kAlong>
struct DivergenceAccumulator {
  static constexpr int kGroupsOfBlock = 8;
  struct Sums {
    Vec<A> of = {}, from = {}, cross = {};
    CE_INLINE void add(const Sums& other) {
      of += other.of;
      from += other.from;
      cross += other.cross;
    }
  };

  Vec<A> of_reference, from_reference, kappa;
  Sums block = {}, piece = {};
  int groups = 0;

  CE_INLINE void close_block() {
    piece.add(block);
    block = {};
    groups = 0;
  }

  CE_INLINE static Vec<A> raised(Vec<A> reference, Vec<A> top) {
    const Vec<A> higher = max(top, reference);
    return kAlong ? broadcast(reduce_max<A>(higher)) : higher;
  }

  CE_INLINE void raise_to(Vec<A> top_of, Vec<A> top_from) {
    close_block();
    const Vec<A> raised_of = raised(of_reference, top_of), raised_from = raised(from_reference, top_from);
    const Vec<A> step = raised_of - of_reference, shift = raised_from - from_reference;
    const Vec<A> factor = exp_minus<A>(step);
    const Vec<A> cross = (piece.cross + piece.of * (shift - kappa * step)) * factor;
    piece.cross = (piece.of == 0) | (factor == 0) ? Vec<A>{} : cross;
    piece.of *= factor;
    piece.from *= exp_minus<A>(shift);
    of_reference = raised_of;
    from_reference = raised_from;
  }

  template <int kCount>
  CE_INLINE void add(const Vec<A> (&of)[kCount], const Vec<A> (&from)[kCount]) {
    using Mask = typename Simd<A>::Mask;
    Vec<A> top_of = of[0], top_from = from[0];
    CE_UNROLL for (int i = 1; i < kCount; ++i) {
      top_of = max(top_of, of[i]);
      top_from = max(top_from, from[i]);
    }
    if (__builtin_expect(
            any_negative(bit_cast<Mask>(top_of > of_reference) | bit_cast<Mask>(top_from > from_reference)), 0)) {
      raise_to(top_of, top_from);
    }
    Vec<A> of_distances[kCount], from_distances[kCount];
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      of_distances[i] = of_reference - of[i];
      from_distances[i] = from_reference - from[i];
    }
    const ExpMinus<A, kCount> of_exps(of_distances), from_exps(from_distances);
    Sums group;
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      const Vec<A> e = of_exps.get(i);
      group.of += e;
      group.from += from_exps.get(i);
      group.cross += RowDivergence<A>::term(e, -of_distances[i], -from_distances[i], kappa);
    }
    block.add(group);
    if (++groups == kGroupsOfBlock) {
      close_block();
    }
  }
};

// Of kSize vectors from class c on.
template <int kSize, typename T, bool kAlong>
CE_INLINE void fetch_ahead(const Sides<T, kAlong>& sides, int64_t c) {
  CE_UNROLL for (int i = 0; i < kSize; i += kRun<T>) {
    sides.logits.view.fetch_ahead(c + i * kLanes<Acc<T>>);
    sides.teacher.view.fetch_ahead(c + i * kLanes<Acc<T>>);
  }
}

template <typename T, bool kAlong>
void diverge_classes(const Problem& p, const Tile& tile, int64_t begin, int64_t end, RowDivergence<double>* rows) {
  using A = Acc<T>;
  constexpr int kStep = kClassStep<A, kAlong>;
  constexpr int kSize = 4;
  constexpr int kVectors = kAlong ? kRun<T> : 1;
  const Sides<T, kAlong> sides(p, tile);
  const auto& of = p.reverse ? sides.logits : sides.teacher;
  const auto& from = p.reverse ? sides.teacher : sides.logits;
  const int lanes = kAlong ? kLanes<A> : tile.rows;
  const bool dense = kAlong && of.view.class_stride == 1 && from.view.class_stride == 1;

  DivergenceAccumulator<A, kAlong> state{of.first_reference(begin, end, tile.rows),
                                         from.first_reference(begin, end, tile.rows), broadcast(A(p.kappa))};
  int64_t c = begin;
  for (; c + kSize * kStep <= end; c += kSize * kStep) {
    Vec<A> of_z[kSize], from_z[kSize];
    if (dense) {
      fetch_ahead<kSize>(sides, c);
    }
    of.template get<kVectors>(c, lanes, dense, of_z);
    from.template get<kVectors>(c, lanes, dense, from_z);
    state.add(of_z, from_z);
  }
  for (; c < end; c += kStep) {
    const int count = lanes_at<A, kAlong>(c, end, tile.rows);
    const auto exists = first_lanes<A>(count);
    const Vec<A> nothing = broadcast(A(-INFINITY));
    const Vec<A> of_z[] = {exists ? of.get(c, count) : nothing};
    const Vec<A> from_z[] = {exists ? from.get(c, count) : nothing};
    state.add(of_z, from_z);
  }
  state.close_block();

  const auto max_sum = [&](Vec<A> reference, Vec<A> sums, int lane) {
    MaxSum<double> result;
    result.sum = kAlong ? reduce_sum<A>(sums) : sums[lane];
    result.max = result.sum == 0 ? -INFINITY : reference[lane];
    return result;
  };
  for (int lane = 0; lane < tile.rows; ++lane) {
    const RowDivergence<double> row{max_sum(state.of_reference, state.piece.of, lane),
                                    max_sum(state.from_reference, state.piece.from, lane),
                                    kAlong ? reduce_sum<A>(state.piece.cross) : state.piece.cross[lane], p.kappa};
    rows[lane] = begin == 0 ? row : row.merge(rows[lane]);
  }
}

template <typename T>
void diverge(const Problem& p, bool along, const Tile& tile, int64_t begin, int64_t end, RowDivergence<double>* rows) {
  (along ? diverge_classes<T, true> : diverge_classes<T, false>)(p, tile, begin, end, rows);
}

// `kOf`: of the softmax of which the divergence is.
template <typename T, bool kAlong, bool kOf>
void divergence_gradient_classes(const Problem& p, const Tile& tile, const TileTargets<Acc<T>>& targets,
                                 const TileDivergence<Acc<T>>& rows, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int kStep = kClassStep<A, kAlong>;
  constexpr int kSize = 4;
  constexpr int kVectors = kAlong ? kRun<T> : 1;
  Sides<T, kAlong> sides(p, tile);
  const bool of_logits = kOf == p.reverse;
  const auto& own = of_logits ? sides.logits : sides.teacher;
  const auto& other = of_logits ? sides.teacher : sides.logits;
  // Takes the place of its own elements that have been used.
  const TileView<T, kAlong> grad(p, p.grad, tile, of_logits ? sides.logits_room : sides.teacher_room);
  const Vec<A> own_top = spread<A, kAlong>(rows.own_max), other_top = spread<A, kAlong>(rows.other_max);
  const Vec<A> scale = spread<A, kAlong>(rows.scale) * own.transform.scale;
  const Vec<A> tilt = spread<A, kAlong>(rows.tilt) * own.transform.scale;
  const Vec<A> upstream = spread<A, kAlong>(rows.upstream) * own.transform.scale;
  const Vec<A> kappa = broadcast(A(p.kappa));
  const auto kept = kept_lanes<A, kAlong>(tile, targets);
  const int lanes = kAlong ? kLanes<A> : tile.rows;
  const bool dense = kAlong && own.view.class_stride == 1 && other.view.class_stride == 1 && grad.class_stride == 1;
  const bool fetches = dense && is_backward(p);
  const bool may_stream = p.streams_grad && p.classes * static_cast<int64_t>(sizeof(T)) >= kStreamedRow;

  // Replaces vectors of its own logits by their gradient.
  const auto differentiate = [&](auto& own_z, const auto& other_z) __attribute__((always_inline)) {
    constexpr int kCount = sizeof(own_z) / sizeof(Vec<A>);
    Vec<A> own_distances[kCount], other_distances[kCount];
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      own_distances[i] = own_top - own_z[i];
      other_distances[i] = other_top - other_z[i];
    }
    const ExpMinus<A, kCount, kElementDegree<T>> own_exps(own_distances);
    Vec<A> of_z[kCount];
    if constexpr (kOf) {
      CE_UNROLL for (int i = 0; i < kCount; ++i) {
        const Vec<A> e = own_exps.get(i);
        of_z[i] = DivergenceGradient<A>::element_of(e, -own_distances[i], -other_distances[i], kappa, scale, tilt);
      }
    } else {
      const ExpMinus<A, kCount, kElementDegree<T>> other_exps(other_distances);
      CE_UNROLL for (int i = 0; i < kCount; ++i) {
        of_z[i] = DivergenceGradient<A>::element_from(own_exps.get(i), other_exps.get(i), scale, upstream);
      }
    }
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      const Vec<A> g = capped(own.transform, of_z[i], own_z[i]);
      own_z[i] = kAlong ? g : kept ? g : Vec<A>{};
    }
  };
  const auto write_groups = [&](int64_t c, bool streams) __attribute__((always_inline)) {
    for (; c + kSize * kStep <= end; c += kSize * kStep) {
      Vec<A> own_z[kSize], other_z[kSize];
      if (fetches) {
        fetch_ahead<kSize>(sides, c);
      }
      own.template get<kVectors>(c, lanes, dense, own_z);
      other.template get<kVectors>(c, lanes, dense, other_z);
      differentiate(own_z, other_z);
      CE_UNROLL for (int i = 0; i < kSize; i += kVectors) {
        grad.template set<kVectors>(c + i * kStep, lanes, dense, streams, own_z + i);
      }
    }
    return c;
  };
  const auto write_singly = [&](int64_t c, int64_t last) __attribute__((always_inline)) {
    for (; c < last; c += kStep) {
      const int count = lanes_at<A, kAlong>(c, last, tile.rows);
      Vec<A> own_z[] = {own.get(c, count)};
      const Vec<A> other_z[] = {other.get(c, count)};
      differentiate(own_z, other_z);
      grad.set(c, count, own_z[0]);
    }
    return last;
  };
  int64_t c = begin;
  if (dense && may_stream) {
    c = write_groups(write_singly(c, grad.align(c, end)), true);
    finish_streaming();
  }
  write_singly(write_groups(c, false), end);
  grad.finish(p, tile);
}

template <typename T>
void divergence_gradient(const Problem& p, bool along, const Tile& tile, const TileTargets<Acc<T>>& targets,
                         const TileDivergence<Acc<T>>& rows, bool of_teacher, int64_t begin, int64_t end) {
  if (along && !targets.kept[0]) {
    clear_classes<T>(p, tile, begin, end);
    return;
  }
  const auto write = [&](auto is_along, auto is_of) {
    divergence_gradient_classes<T, is_along, is_of>(p, tile, targets, rows, begin, end);
  };
  constexpr std::true_type kYes;
  constexpr std::false_type kNo;
  const bool is_of = of_teacher != p.reverse;
  along ? (is_of ? write(kYes, kYes) : write(kYes, kNo)) : (is_of ? write(kNo, kYes) : write(kNo, kNo));
}

}  // namespace ce::cpu::CE_ISA
