// The loops over time of training/loops.py for the CPU; training/native.py compiles and calls them.
//
// Its one rule: the same contract as loops.py, buffer by buffer. The rows of a batch never meet in a recurrence, so
// each thread takes its rows through all steps: nothing waits, and no sum depends on the number of threads.
//
// Buffers are time-major [T, B, blocks * H] and dense. H fills whole cache lines: the caller pads the units, and a
// padded unit is 0 at every step because its weights are.

#include <algorithm>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

// A tile of a product is TILE rows by PANEL vectors, whose sums stay in registers: the sizes are those measured best.
#if defined(__AVX512F__)
constexpr int BYTES = 64, PANEL = 3, TILE = 8;
#else
constexpr int BYTES = 32, PANEL = 2, TILE = 4;
#endif
constexpr int BLOCK = 32;  // rows taken through time together: their state stays in the first cache

enum Activation { SIGMOID, HARDSIGMOID, TANH, RELU, IDENTITY, HARDTANH, SOFTSIGN };

struct Form {  // native.py has its twin
    int64_t steps, batch, hidden, gates, keep, after, s, phi, threads;
};

template <class real>
struct Kernel {
    typedef real vec __attribute__((vector_size(BYTES)));
    typedef real loose __attribute__((vector_size(BYTES), aligned(sizeof(real))));
    typedef std::conditional_t<sizeof(real) == 4, int32_t, int64_t> integer;
    typedef integer bits __attribute__((vector_size(BYTES)));
    static constexpr int LANES = BYTES / sizeof(real);

    static vec load(const real* from) { return *reinterpret_cast<const loose*>(from); }
    static void store(real* to, vec value) { *reinterpret_cast<loose*>(to) = value; }
    static vec clamp(vec x, real low, real high) {  // a NaN stays one
        x = x > high ? vec{} + high : x;
        return x < low ? vec{} + low : x;
    }

    // exp(x) - 1 to the last bits for |x| <= 87: x = k ln 2 + r, then 2^k from its bits and e^r - 1 from Taylor.
    static vec expm1(vec x) {
        constexpr bool single = sizeof(real) == 4;
        constexpr int mantissa = single ? 23 : 52, terms = single ? 8 : 14;
        constexpr real shift = real(3) * real(int64_t(1) << (mantissa - 1));  // adding it rounds to a whole number
        constexpr real high = single ? real(0x1.62e4p-1) : real(0x1.62e42feep-1);
        constexpr real low = single ? real(0x1.7f7d1cp-20) : real(0x1.a39ef35793c76p-33);
        const vec shifted = x * real(1.4426950408889634) + shift;
        const vec k = shifted - shift;
        const vec r = (x - k * high) - k * low;
        vec sum = vec{} + real(1);
        for (int n = terms; n > 1; --n) sum = sum * r * (real(1) / real(n)) + real(1);
        const bits exponent = (bits)shifted - (bits)(vec{} + shift) + integer(single ? 127 : 1023);
        const vec scale = (vec)(exponent << mantissa);
        return scale * (sum * r) + (scale - real(1));
    }

    static vec apply(int64_t kind, vec x) {
        switch (kind) {
            case SIGMOID: return real(1) / (expm1(clamp(-x, -87, 87)) + real(2));
            case HARDSIGMOID: return clamp(x / real(6) + real(0.5), 0, 1);
            case TANH: {
                const vec e = expm1(clamp(x + x, -40, 40));
                return e / (e + real(2));
            }
            case RELU: return x < 0 ? vec{} : x;
            case HARDTANH: return clamp(x, -1, 1);
            case SOFTSIGN: return x / ((x < 0 ? -x : x) + real(1));
            default: return x;
        }
    }

    // The derivative of an activation, from its value y.
    static vec slope(int64_t kind, vec y) {
        const vec zero{}, one = zero + real(1);
        switch (kind) {
            case SIGMOID: return y * (one - y);
            case HARDSIGMOID: return (y > zero) & (y < one) ? zero + real(1) / real(6) : zero;
            case TANH: return one - y * y;
            case RELU: return y > zero ? one : zero;
            case HARDTANH: return (y > -one) & (y < one) ? one : zero;
            case SOFTSIGN: {
                const vec rest = one - (y < zero ? -y : y);
                return rest * rest;
            }
            default: return one;
        }
    }

    // A matrix [depth, width] in panels of PANEL vectors, so that a product reads it from end to end.
    class Matrix {
      public:
        // From `rows` [depth, width] where transposed is false, else from its transpose; both dense.
        Matrix(const real* from, int64_t depth, int64_t width, bool transposed)
            : depth_(depth), width_(width), data_(depth * width) {
            real* to = data_.data();
            for (int64_t left = 0; left < width; left += PANEL * LANES)
                for (int64_t k = 0; k < depth; ++k)
                    for (int64_t j = left; j < std::min(left + PANEL * LANES, width); ++j)
                        *to++ = transposed ? from[j * depth + k] : from[k * width + j];
        }

        // c [rows, width] += a [rows, depth] times this.
        void multiply(int64_t rows, const real* a, int64_t lda, real* c, int64_t ldc) const {
            const real* panel = data_.data();
            for (int64_t left = 0; left < width_; left += PANEL * LANES) {
                const int64_t vectors = std::min<int64_t>(PANEL, (width_ - left) / LANES);
                switch (vectors) {
                    case 1: strip<1>(rows, a, lda, panel, c + left, ldc); break;
                    case 2: strip<2>(rows, a, lda, panel, c + left, ldc); break;
                    default: strip<PANEL>(rows, a, lda, panel, c + left, ldc);
                }
                panel += depth_ * vectors * LANES;
            }
        }

      private:
        template <int C>
        void strip(int64_t rows, const real* a, int64_t lda, const real* b, real* c, int64_t ldc) const {
            int64_t i = 0;
            for (; i + TILE <= rows; i += TILE) tile<TILE, C>(a + i * lda, lda, b, c + i * ldc, ldc);
            for (; i < rows; ++i) tile<1, C>(a + i * lda, lda, b, c + i * ldc, ldc);
        }

        template <int R, int C>
        void tile(const real* a, int64_t lda, const real* b, real* c, int64_t ldc) const {
            vec sum[R][C];
            for (int i = 0; i < R; ++i)
                for (int j = 0; j < C; ++j) sum[i][j] = load(c + i * ldc + j * LANES);
            for (int64_t k = 0; k < depth_; ++k, b += C * LANES)
                for (int j = 0; j < C; ++j) {
                    const vec column = load(b + j * LANES);
                    for (int i = 0; i < R; ++i) sum[i][j] += a[i * lda + k] * column;
                }
            for (int i = 0; i < R; ++i)
                for (int j = 0; j < C; ++j) store(c + i * ldc + j * LANES, sum[i][j]);
        }

        int64_t depth_, width_;
        std::vector<real> data_;
    };

    // work(first row, rows) over the whole batch, block by block, on `threads` threads.
    template <class Work>
    static void over_rows(const Form& f, Work work) {
        const int64_t tiles = (f.batch + TILE - 1) / TILE, threads = std::min(f.threads, tiles);
        auto part = [&](int64_t index) {
            const int64_t end = std::min((index + 1) * tiles / threads * TILE, f.batch);
            for (int64_t row = index * tiles / threads * TILE; row < end; row += BLOCK)
                work(row, std::min<int64_t>(BLOCK, end - row));
        };
        std::vector<std::thread> others;
        for (int64_t index = 1; index < threads; ++index) others.emplace_back(part, index);
        if (threads > 0) part(0);
        for (auto& other : others) other.join();
    }

    static vec mix(const Form& f, vec z, vec h, vec c) { return f.keep ? c + z * (h - c) : h + z * (c - h); }

    // Per unit of a row: body(j) for each vector.
    template <class Body>
    static void each(int64_t rows, int64_t hidden, Body body) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < hidden; j += LANES) body(i, j);
    }

    static void gated_forward(const Form& f, real* a, real* h, real* e, const real* u, const real* b_u) {
        const int64_t H = f.hidden, gates = f.gates * H, width = gates + H;
        const Matrix u_gates(u, H, gates, true), u_candidate(u + gates * H, H, H, true);
        over_rows(f, [&](int64_t first, int64_t rows) {
            for (int64_t t = 0; t < f.steps; ++t) {
                const int64_t at = t * f.batch + first;
                real *at_a = a + at * width, *at_e = e + at * H, *at_h = h + at * H, *next = at_h + f.batch * H;
                u_gates.multiply(rows, at_h, H, at_a, width);
                if (f.after) {
                    each(rows, H, [&](int64_t i, int64_t j) { store(at_e + i * H + j, load(b_u + j)); });
                    u_candidate.multiply(rows, at_h, H, at_e, H);
                }
                each(rows, gates, [&](int64_t i, int64_t j) {
                    real* gate = at_a + i * width + j;
                    store(gate, apply(f.s, load(gate)));
                });
                if (!f.after) {
                    each(rows, H, [&](int64_t i, int64_t j) {
                        const vec r = load(at_a + i * width + gates - H + j);
                        store(at_e + i * H + j, r * load(at_h + i * H + j));
                    });
                    u_candidate.multiply(rows, at_e, H, at_a + gates, width);
                }
                each(rows, H, [&](int64_t i, int64_t j) {
                    real* row = at_a + i * width + j;
                    vec c = load(row + gates);
                    if (f.after) c += load(row + gates - H) * load(at_e + i * H + j);
                    c = apply(f.phi, c);
                    store(row + gates, c);
                    store(next + i * H + j, mix(f, load(row), load(at_h + i * H + j), c));
                });
            }
        });
    }

    static void gated_backward(const Form& f, const real* grad, const real* a, const real* h, const real* e,
                               const real* u, real* d, real* d_candidate, real* carry) {
        const int64_t H = f.hidden, gates = f.gates * H, width = gates + H;
        const Matrix u_all(u, f.after ? width : gates, H, false), u_candidate(u + gates * H, H, H, false);
        over_rows(f, [&](int64_t first, int64_t rows) {
            std::vector<real> through(rows * H);  // the gradient of r o h
            real* at_carry = carry + first * H;
            for (int64_t t = f.steps - 1; t >= 0; --t) {
                const int64_t at = t * f.batch + first;
                const real *at_a = a + at * width, *at_h = h + at * H, *at_e = e + at * H;
                real* at_d = d + at * width;
                each(rows, H, [&](int64_t i, int64_t j) {
                    const real* row = at_a + i * width + j;
                    real *out = at_d + i * width + j, *back = at_carry + i * H + j;
                    const vec g = load(grad + (at + i) * H + j) + load(back);
                    const vec z = load(row), r = load(row + gates - H), c = load(row + gates);
                    const vec opened = g * z, shut = g - opened, old = load(at_h + i * H + j);
                    const vec d_z = f.keep ? g * (old - c) : g * (c - old);
                    const vec d_c = (f.keep ? shut : opened) * slope(f.phi, c);
                    store(back, f.keep ? opened : shut);
                    if (!f.after) {
                        store(out + gates, d_c);
                        store(out, d_z);  // completed below
                        store(through.data() + i * H + j, vec{});
                        return;
                    }
                    store(out + gates, d_c * r);
                    store(d_candidate + (at + i) * H + j, d_c);
                    const vec d_r = d_c * load(at_e + i * H + j);
                    if (f.gates == 1) {
                        store(out, (d_z + d_r) * slope(f.s, z));
                    } else {
                        store(out, d_z * slope(f.s, z));
                        store(out + H, d_r * slope(f.s, r));
                    }
                });
                if (!f.after) {
                    u_candidate.multiply(rows, at_d + gates, width, through.data(), H);
                    each(rows, H, [&](int64_t i, int64_t j) {
                        const real* row = at_a + i * width + j;
                        real *out = at_d + i * width + j, *back = at_carry + i * H + j;
                        const vec d_rh = load(through.data() + i * H + j), d_r = d_rh * load(at_h + i * H + j);
                        const vec z = load(row), r = load(row + gates - H);
                        store(back, load(back) + d_rh * r);
                        if (f.gates == 1) {
                            store(out, (load(out) + d_r) * slope(f.s, z));
                        } else {
                            store(out, load(out) * slope(f.s, z));
                            store(out + H, d_r * slope(f.s, r));
                        }
                    });
                }
                u_all.multiply(rows, at_d, width, at_carry, H);
            }
        });
    }

    static void folded_forward(const Form& f, real* a, real* h, const real* u, const real* z) {
        const int64_t H = f.hidden;
        const Matrix weights(u, H, H, true);
        over_rows(f, [&](int64_t first, int64_t rows) {
            for (int64_t t = 0; t < f.steps; ++t) {
                const int64_t at = (t * f.batch + first) * H;
                real *at_a = a + at, *at_h = h + at, *next = at_h + f.batch * H;
                weights.multiply(rows, at_h, H, at_a, H);
                each(rows, H, [&](int64_t i, int64_t j) {
                    const vec c = apply(f.phi, load(at_a + i * H + j));
                    store(at_a + i * H + j, c);
                    store(next + i * H + j, z ? mix(f, load(z + j), load(at_h + i * H + j), c) : c);
                });
            }
        });
    }

    static void folded_backward(const Form& f, real* grad, const real* a, const real* u, const real* z, real* d,
                                real* carry) {
        const int64_t H = f.hidden;
        const Matrix weights(u, H, H, false);
        over_rows(f, [&](int64_t first, int64_t rows) {
            real* at_carry = carry + first * H;
            for (int64_t t = f.steps - 1; t >= 0; --t) {
                const int64_t at = (t * f.batch + first) * H;
                each(rows, H, [&](int64_t i, int64_t j) {
                    const int64_t in_row = i * H + j;
                    const vec g = load(grad + at + in_row) + load(at_carry + in_row);
                    const vec opened = z ? g * load(z + j) : g, shut = g - opened;
                    store(grad + at + in_row, g);
                    store(d + at + in_row, (f.keep ? shut : opened) * slope(f.phi, load(a + at + in_row)));
                    store(at_carry + in_row, f.keep ? opened : shut);
                });
                weights.multiply(rows, d + at, H, at_carry, H);
            }
        });
    }

    static void lstm_forward(const Form& f, real* a, real* h, real* c, real* p, const real* u) {
        const int64_t H = f.hidden, width = 4 * H;
        const Matrix weights(u, H, width, true);
        over_rows(f, [&](int64_t first, int64_t rows) {
            for (int64_t t = 0; t < f.steps; ++t) {
                const int64_t at = t * f.batch + first;
                real* at_a = a + at * width;
                weights.multiply(rows, h + at * H, H, at_a, width);
                each(rows, H, [&](int64_t i, int64_t j) {
                    real* row = at_a + i * width + j;
                    const int64_t now = (at + i) * H + j, next = now + f.batch * H;
                    const vec in = apply(f.s, load(row)), forget = apply(f.s, load(row + H));
                    const vec out = apply(f.s, load(row + 2 * H)), candidate = apply(f.phi, load(row + 3 * H));
                    const vec memory = forget * load(c + now) + in * candidate, shown = apply(f.phi, memory);
                    store(row, in);
                    store(row + H, forget);
                    store(row + 2 * H, out);
                    store(row + 3 * H, candidate);
                    store(c + next, memory);
                    store(p + now, shown);
                    store(h + next, out * shown);
                });
            }
        });
    }

    static void lstm_backward(const Form& f, const real* grad, const real* a, const real* c, const real* p,
                              const real* u, real* d, real* carry, real* carry_c) {
        const int64_t H = f.hidden, width = 4 * H;
        const Matrix weights(u, width, H, false);
        over_rows(f, [&](int64_t first, int64_t rows) {
            real *back = carry + first * H, *back_c = carry_c + first * H;
            for (int64_t t = f.steps - 1; t >= 0; --t) {
                const int64_t at = t * f.batch + first;
                each(rows, H, [&](int64_t i, int64_t j) {
                    const real* row = a + (at + i) * width + j;
                    real* to = d + (at + i) * width + j;
                    const int64_t now = (at + i) * H + j;
                    const vec in = load(row), forget = load(row + H), out = load(row + 2 * H);
                    const vec candidate = load(row + 3 * H), shown = load(p + now);
                    const vec g = load(grad + now) + load(back + i * H + j);
                    const vec g_c = load(back_c + i * H + j) + g * out * slope(f.phi, shown);
                    store(to, g_c * candidate * slope(f.s, in));
                    store(to + H, g_c * load(c + now) * slope(f.s, forget));
                    store(to + 2 * H, g * shown * slope(f.s, out));
                    store(to + 3 * H, g_c * in * slope(f.phi, candidate));
                    store(back_c + i * H + j, g_c * forget);
                    store(back + i * H + j, vec{});
                });
                weights.multiply(rows, d + at * width, width, back, H);
            }
        });
    }

    static void scan_forward(const Form& f, real* a, real* h) {
        const int64_t H = f.hidden;
        over_rows(f, [&](int64_t first, int64_t rows) {
            for (int64_t t = 0; t < f.steps; ++t)
                each(rows, H, [&](int64_t i, int64_t j) {
                    const int64_t at = t * f.batch + first + i;
                    real *row = a + at * 2 * H + j, *now = h + at * H + j;
                    const vec z = apply(f.s, load(row)), c = apply(f.phi, load(row + H));
                    store(row, z);
                    store(row + H, c);
                    store(now + f.batch * H, mix(f, z, load(now), c));
                });
        });
    }

    static void scan_backward(const Form& f, const real* grad, const real* a, const real* h, real* d, real* carry) {
        const int64_t H = f.hidden;
        over_rows(f, [&](int64_t first, int64_t rows) {
            for (int64_t t = f.steps - 1; t >= 0; --t)
                each(rows, H, [&](int64_t i, int64_t j) {
                    const int64_t at = t * f.batch + first + i;
                    real *to = d + at * 2 * H + j, *back = carry + (first + i) * H + j;
                    const vec z = load(a + at * 2 * H + j), c = load(a + at * 2 * H + H + j), old = load(h + at * H + j);
                    const vec g = load(grad + at * H + j) + load(back), opened = g * z, shut = g - opened;
                    store(to, (f.keep ? g * (old - c) : g * (c - old)) * slope(f.s, z));
                    store(to + H, (f.keep ? shut : opened) * slope(f.phi, c));
                    store(back, f.keep ? opened : shut);
                });
        });
    }
};

}  // namespace

#define EXPORT(real)                                                                                                  \
    void gated_forward_##real(const Form* f, real* a, real* h, real* e, const real* u, const real* b_u) {             \
        Kernel<real>::gated_forward(*f, a, h, e, u, b_u);                                                             \
    }                                                                                                                 \
    void gated_backward_##real(const Form* f, const real* grad, const real* a, const real* h, const real* e,          \
                               const real* u, real* d, real* d_candidate, real* carry) {                              \
        Kernel<real>::gated_backward(*f, grad, a, h, e, u, d, d_candidate, carry);                                    \
    }                                                                                                                 \
    void folded_forward_##real(const Form* f, real* a, real* h, const real* u, const real* z) {                       \
        Kernel<real>::folded_forward(*f, a, h, u, z);                                                                 \
    }                                                                                                                 \
    void folded_backward_##real(const Form* f, real* grad, const real* a, const real* u, const real* z, real* d,      \
                                real* carry) {                                                                        \
        Kernel<real>::folded_backward(*f, grad, a, u, z, d, carry);                                                   \
    }                                                                                                                 \
    void lstm_forward_##real(const Form* f, real* a, real* h, real* c, real* p, const real* u) {                      \
        Kernel<real>::lstm_forward(*f, a, h, c, p, u);                                                                \
    }                                                                                                                 \
    void lstm_backward_##real(const Form* f, const real* grad, const real* a, const real* c, const real* p,           \
                              const real* u, real* d, real* carry, real* carry_c) {                                   \
        Kernel<real>::lstm_backward(*f, grad, a, c, p, u, d, carry, carry_c);                                         \
    }                                                                                                                 \
    void scan_forward_##real(const Form* f, real* a, real* h) { Kernel<real>::scan_forward(*f, a, h); }               \
    void scan_backward_##real(const Form* f, const real* grad, const real* a, const real* h, real* d, real* carry) {  \
        Kernel<real>::scan_backward(*f, grad, a, h, d, carry);                                                        \
    }

extern "C" {
EXPORT(float)
EXPORT(double)
}
