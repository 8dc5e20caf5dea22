// What a kernel sees of a tile: its operands in vectors, and the values of its rows. Included by tile_kernels.h, so
// without a guard.

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
using Room = Vec<A>[kAlong ? 1 : kNarrow * kLanes<A>];

// A tile of an operand of shape (rows, classes): vector c starts at class c, its lanes as many as exist. If the tile is
// staged, its columns are there; if the operand is transposed, an input's columns are made at the beginning, and what
// was set of an output is written by finish().
template <typename T, bool kAlong>
struct TileView {
  using A = Acc<T>;
  T* data = nullptr;
  int64_t class_stride = 0;
  int64_t row_stride = 0;
  Vec<A>* columns = nullptr;

  template <typename Pointer>
  CE_INLINE TileView(const Problem& p, const Operand<Pointer>& operand, const Tile& tile, Room<A, kAlong>& room) {
    if (!operand.data) {
      return;
    }
    data = static_cast<T*>(operand.data) + row_offset(p, tile.row, operand.strides);
    class_stride = operand.class_stride;
    row_stride = operand.strides[p.dims - 1];
    if (!kAlong && tile.columns) {
      columns = static_cast<Vec<A>*>(tile.columns);
    } else if (is_transposed<A, kAlong>(p, operand)) {
      columns = room;
      if constexpr (std::is_const_v<T>) {
        transpose_in(data, row_stride, tile.rows, p.classes, room);
      }
    }
  }
  CE_INLINE void finish(const Problem& p, const Tile& tile) const {
    if (!kAlong && columns && !tile.columns) {
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
  // Begins to read what comes kBytesAhead after class c, of classes next to each other.
  CE_INLINE void fetch_ahead(int64_t c) const { __builtin_prefetch(data + c + kBytesAhead / sizeof(T)); }
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

  CE_INLINE Coefficients(const Problem& p, const Tile& tile, Room<A, kAlong>& room)
      : weight(static_cast<const A*>(p.weight)),
        probabilities(p, p.target_type == TargetType::kProbabilities ? p.target : Input(), {tile.row, tile.rows}, room),
        smoothing(smoothing_of<A>(p)) {}

  CE_INLINE Vec<A> weights(int64_t c, int count) const {
    return !weight ? broadcast(A(1)) : kAlong ? load(weight + c, 1, count) : broadcast(weight[c]);
  }
  CE_INLINE Vec<A> get(int64_t c, int count) const {
    const Vec<A> w = weights(c, count);
    return probabilities.data ? smoothing.coefficient(w, probabilities.get(c, count)) : smoothing.background(w);
  }
};

template <typename A>
CE_INLINE typename Simd<A>::Mask first_lanes(int count) {
  typename Simd<A>::Mask lane;
  for (int i = 0; i < kLanes<A>; ++i) {
    lane[i] = i;
  }
  return lane < count;
}

// Each row's logit at its target's index; 0 where that is not one of the classes [begin, end).
template <typename T, bool kAlong>
CE_INLINE Vec<Acc<T>> target_logits(const TileView<const T, kAlong>& logits, const TileTargets<Acc<T>>& targets,
                                    int rows, int64_t begin, int64_t end) {
  T at_target[kLanes<Acc<T>>] = {};
  Vec<Acc<T>> in_column = {};
  for (int lane = 0; lane < rows; ++lane) {
    const int64_t target = targets.index[lane];
    if (target >= begin && target < end) {
      if (!kAlong && logits.columns) {
        in_column[lane] = logits.columns[target][lane];
      } else {
        at_target[lane] = logits.at(lane, target);
      }
    }
  }
  return !kAlong && logits.columns ? in_column : load(at_target);
}

// The lanes whose rows are kept. Along a row nobody asks who has not kept it.
template <typename A, bool kAlong>
CE_INLINE typename Simd<A>::Mask kept_lanes(const Tile& tile, const TileTargets<A>& targets) {
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

}  // namespace ce::cpu::CE_ISA
