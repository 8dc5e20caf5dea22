// The kernels of tile.h for the gradients of logits, target, weight and logit_scale. Included by tile_kernels.h, so
// without a guard.

namespace ce::cpu::CE_ISA {

// The gradient of one row that has none.
template <typename T>
void clear_classes(const Problem& p, const Tile& tile, int64_t begin, int64_t end) {
  Room<Acc<T>, true> columns;
  const TileView<T, true> grad(p, p.grad, tile, columns);
  for (int64_t c = begin; c < end; c += kLanes<Acc<T>>) {
    grad.set(c, lanes_at<Acc<T>, true>(c, end, 1), Vec<Acc<T>>{});
  }
}

template <typename T, bool kAlong, bool kLinear, Change kChange, bool kTilted>
void gradient_classes(const Problem& p, const Tile& tile, const TileTargets<Acc<T>>& targets,
                      const TileGradient<Acc<T>>& rows, int64_t begin, int64_t end, Exps<Acc<T>> kept_exps) {
  if (kAlong && !targets.kept[0]) {
    return clear_classes<T>(p, tile, begin, end);
  }
  using A = Acc<T>;
  using Row = RowGradient<A>;
  constexpr int kStep = kClassStep<A, kAlong>;
  Room<A, kAlong> columns, probability_columns;
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
  const Vec<A> target_column = capped(transform, target_element, z_target);
  store(target_grad, target_column);

  const auto kept = kept_lanes<A, kAlong>(tile, targets);
  constexpr int kVectors = kAlong && !kLinear ? kRun<T> : 1;
  constexpr int kSize = 4;
  const int lanes = kAlong ? kLanes<A> : tile.rows;
  const bool dense = kAlong && logits.class_stride == 1 && grad.class_stride == 1;
  const bool fetches = dense && is_backward(p);
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
        if (fetches) {
          logits.fetch_ahead(c + i * kStep);
        }
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
  if (kAlong && !kTilted && kept_exps.values) {
    c = reads_in_stripes() ? write_kept(std::true_type()) : write_kept(std::false_type());
  } else if (dense) {
    c = write_singly(c, grad.align(c, end));
    if (may_stream) {
      c = write_groups(c, true);
      finish_streaming();
    }
  }
  write_singly(write_groups(c, false), end);
  for (int lane = 0; lane < tile.rows; ++lane) {
    const int64_t target = targets.index[lane];
    if (target >= begin && target < end) {
      if (!kAlong && grad.columns) {
        grad.columns[target][lane] = target_column[lane];
      } else {
        grad.at(lane, target) = target_grad[lane];
      }
    }
  }
  grad.finish(p, tile);
}

template <typename T>
WriteGradient<Acc<T>>* gradient(const Problem& p, bool along) {
  return specialize(p, along, p.grad_entropy.data, [](auto a, auto linear, auto change, auto tilted) {
    return &gradient_classes<T, a, linear, change, tilted>;
  });
}

template <typename T, bool kAlong>
void sum_classes(const Problem& p, const Tile& tile, double* sums) {
  using A = Acc<T>;
  Room<A, kAlong> columns;
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
void sum_coefficients(const Problem& p, bool along, const Tile& tile, double* sums) {
  (along ? sum_classes<T, true> : sum_classes<T, false>)(p, tile, sums);
}

template <typename T, bool kAlong>
void target_gradient_classes(const Problem& p, const Tile& tile, const TileGradient<Acc<T>>& rows, int64_t begin,
                             int64_t end) {
  using A = Acc<T>;
  Room<A, kAlong> columns, probability_columns;
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
void target_gradient(const Problem& p, bool along, const Tile& tile, const TileGradient<Acc<T>>& rows, int64_t begin,
                     int64_t end) {
  (along ? target_gradient_classes<T, true> : target_gradient_classes<T, false>)(p, tile, rows, begin, end);
}

template <typename T, bool kAlong>
void weight_gradient_classes(const Problem& p, const Tile& tile, const TileGradient<Acc<T>>& rows, int64_t begin,
                             int64_t end, double* sums) {
  using A = Acc<T>;
  Room<A, kAlong> columns, probability_columns;
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
void weight_gradient(const Problem& p, bool along, const Tile& tile, const TileGradient<Acc<T>>& rows, int64_t begin,
                     int64_t end, double* sums) {
  (along ? weight_gradient_classes<T, true> : weight_gradient_classes<T, false>)(p, tile, rows, begin, end, sums);
}

template <typename T, bool kAlong>
void logit_scale_gradient_classes(const Problem& p, const Tile& tile, const TileTargets<Acc<T>>& targets,
                                  const TileGradient<Acc<T>>& rows, int64_t begin, int64_t end, double* sum) {
  using A = Acc<T>;
  Room<A, kAlong> columns, probability_columns;
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
void logit_scale_gradient(const Problem& p, bool along, const Tile& tile, const TileTargets<Acc<T>>& targets,
                          const TileGradient<Acc<T>>& rows, int64_t begin, int64_t end, double* sum) {
  if (targets.any_kept) {
    (along ? logit_scale_gradient_classes<T, true> : logit_scale_gradient_classes<T, false>)(p, tile, targets, rows,
                                                                                             begin, end, sum);
  }
}

}  // namespace ce::cpu::CE_ISA
