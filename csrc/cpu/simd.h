// SPDX-License-Identifier: Apache-2.0
//
// Vectors of the instruction set that is being compiled. No include guard: cpu/instruction_sets.h
// includes this once per instruction set, inside that set's namespace.

#define DILSEG_INLINE inline __attribute__((always_inline))

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(DILSEG_VECTOR_BYTES)));
};
// Operators act on each lane; comparisons give 0 or -1 per lane, in integers of A's width.
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
using VecInt = typename VectorOf<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>::type;
using VecBits = VectorOf<uint32_t>::type;
template <class A>
constexpr int64_t kLanes = DILSEG_VECTOR_BYTES / sizeof(A);

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <class A>
DILSEG_INLINE Vec<A> vec_load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class A>
DILSEG_INLINE void vec_store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof(v));
}
// The first n values; the other lanes are 0.
template <class A>
DILSEG_INLINE Vec<A> vec_load_part(const A* p, int64_t n) {
  if (n >= kLanes<A>) {
    return vec_load(p);
  }
  Vec<A> v{};
  std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(A));
  return v;
}
template <class A>
DILSEG_INLINE Vec<A> vec_set(A value) {
  return value - Vec<A>{};
}
template <class A>
DILSEG_INLINE Vec<A> vec_max(Vec<A> a, Vec<A> b) {
  return a < b ? b : a;
}
// The same bits as integers, and back. (std::bit_cast is no option: its instances would be compiled
// for no instruction set in particular, and passing vectors to them would go through memory.)
template <class A>
DILSEG_INLINE VecInt<A> vec_bits(Vec<A> v) {
  return (VecInt<A>)v;
}
template <class A>
DILSEG_INLINE Vec<A> vec_from_bits(VecInt<A> bits) {
  return (Vec<A>)bits;
}
// Lanes of v where mask is -1, else +0; a select, so that nan does not pass.
template <class A>
DILSEG_INLINE Vec<A> vec_keep(Vec<A> v, VecInt<A> mask) {
  return vec_from_bits<A>(vec_bits<A>(v) & mask);
}

// Lane i of the result is lane lanes[i] of v.
template <class A>
DILSEG_INLINE Vec<A> vec_permute(Vec<A> v, VecInt<A> lanes) {
#ifdef __clang__
  Vec<A> permuted;
  for (int64_t i = 0; i < kLanes<A>; ++i) {
    permuted[i] = v[lanes[i]];
  }
  return permuted;
#else
  return __builtin_shuffle(v, lanes);
#endif
}

// exp(x) for x <= 88. Within 1 unit in the last place; results below 2^-126 become 0; nan stays
// nan. exp(x) = 2^n * exp(r) with n = round(x / ln 2), |r| <= ln(2) / 2 (Cody and Waite), and the
// degree-7 polynomial of the Cephes library (expf) for exp(r).
DILSEG_INLINE Vec<float> vec_exp(Vec<float> x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kRound = 0x1.8p23f;       // adding it leaves round(z) in the low mantissa bits
  constexpr float kLn2High = 0.693359375f;  // 9 bits: n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kSmallest = -87.33654f;  // ln 2^-126
  const Vec<float> shifted = x * kLog2e + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (x - n * kLn2High) - n * kLn2Low;
  Vec<float> p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec<float> series = (p * r) * r + r + 1.0f;
  // The shift drops kRound's own bits and leaves n at the exponent. Unsigned: far outside of the
  // range it overflows.
  const Vec<float> power = (Vec<float>)(((VecBits)shifted << 23) + 0x3f800000u);
  return vec_keep<float>(series * power, ~(x < kSmallest));
}
DILSEG_INLINE Vec<double> vec_exp(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) {
    x[i] = std::exp(x[i]);
  }
  return x;
}

// log(x) for normal x > 0, inf and nan. Within 1 unit in the last place: x = 2^n m, m in
// [sqrt(1/2), sqrt(2)), and the polynomial of the Cephes library (logf) for log(m).
DILSEG_INLINE Vec<float> vec_log(Vec<float> x) {
  using V = Vec<float>;
  using I = VecInt<float>;
  constexpr int32_t kHalfSqrt2 = 0x3f3504f3;  // sqrt(1/2)
  const I bits = vec_bits<float>(x);
  const I exponent = (bits - kHalfSqrt2) >> 23;
  const V m = vec_from_bits<float>(bits - (exponent << 23)) - 1.0f;
  const V n = __builtin_convertvector(exponent, V);
  const V z = m * m;
  V p = 7.0376836292e-2f * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  V y = p * m * z + n * -2.12194440e-4f;
  y = y - 0.5f * z;
  const V result = (m + y) + n * 0.693359375f;
  const I normal = x < std::numeric_limits<float>::infinity();
  return normal ? result : x;
}
DILSEG_INLINE Vec<double> vec_log(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) {
    x[i] = std::log(x[i]);
  }
  return x;
}

// An array whose rows begin at vector boundaries.
template <class A>
class Aligned {
 public:
  explicit Aligned(int64_t size)
      : data_(static_cast<A*>(::operator new(static_cast<size_t>(size) * sizeof(A), kAlign))) {}
  Aligned(Aligned&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Aligned& operator=(Aligned&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Aligned() { ::operator delete(data_, kAlign); }
  A* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  A* data_;
};

// Results of this size outlive the caches before anybody reads them: they are written around the
// caches, which spares reading every line first.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

DILSEG_INLINE bool is_vector_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % DILSEG_VECTOR_BYTES == 0;
}

// Writes a vector to an aligned place, around the caches where `streamed`.
DILSEG_INLINE void vec_write(float* to, Vec<float> v, [[maybe_unused]] bool streamed) {
#if DILSEG_X86_64
  if (streamed) {
#if DILSEG_VECTOR_BYTES == 16
    _mm_stream_ps(to, v);
#elif DILSEG_VECTOR_BYTES == 32
    _mm256_stream_ps(to, v);
#else
    _mm512_stream_ps(to, v);
#endif
    return;
  }
#endif
  vec_store(to, v);
}

// Writes n values, around the caches where `streamed`.
template <class T, class A>
DILSEG_INLINE void write_row(T* __restrict to, const A* __restrict from, int64_t n, bool streamed) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; i < n && !is_vector_aligned(to + i); ++i) {
      to[i] = from[i];
    }
    for (; i + kLanes<float> <= n; i += kLanes<float>) {
      vec_write(to + i, vec_load(from + i), streamed);
    }
  }
  for (; i < n; ++i) {
    store(to + i, from[i]);
  }
}

// Orders streamed writes before what the thread does next.
DILSEG_INLINE void finish_streaming() {
#if DILSEG_X86_64
  _mm_sfence();
#endif
}
