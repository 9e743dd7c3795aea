// The hot operations on a CPU, one pass over memory each. Compiled on first use by cpu_build.py, called by cpu.py.
//
// Fake quantization divides and rounds as `reference.py` does, so codes are equal bit for bit: nothing here may be
// compiled with -ffast-math. Packed codes are a little-endian bitstream along each row (`bitstream.py`): eight codes
// of b bits are b bytes, so eight lanes take them from one word with one shift. Every row is summed by one thread in
// one order: results do not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t bfloat16;

namespace {

const float MIN_SCALE = 1e-4f, MAX_SCALE = 1e4f;
const int64_t LANES = 8;

// NaN passes through, as in torch.clamp.
inline float clamp(float value, float lowest, float highest) {
    value = value < lowest ? lowest : value;
    return value > highest ? highest : value;
}

inline float load(const float* from) { return *from; }

inline float load(const bfloat16* from) {
    uint32_t bits = uint32_t(*from) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline void store(float value, float* to) { *to = value; }

// Rounds half to even; a NaN stays one.
inline void store(float value, bfloat16* to) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *to = bfloat16(value != value ? 0x7fc0 : rounded);
}

struct Grid {
    float scale, lowest, highest;  // codes minus the zero point lie in [lowest, highest]

    Grid(float s, float z, int bits) {
        float qmax = float((1 << bits) - 1), zero = clamp(rintf(z), 0.0f, qmax);
        scale = zero == zero ? clamp(s, MIN_SCALE, MAX_SCALE) : zero;
        lowest = -zero;
        highest = qmax - zero;
    }
};

template <typename Out>
void fake_quant(const float* weight, const float* scale, const float* zero, Out* out, int64_t groups, int64_t size,
                int bits, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t group = 0; group < groups; group++) {
        const Grid grid(scale[group], zero[group], bits);
        const float* w = weight + group * size;
        Out* o = out + group * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++)
            store(clamp(rintf(w[i] / grid.scale), grid.lowest, grid.highest) * grid.scale, o + i);
    }
}

template <typename Grad>
void fake_quant_backward(const Grad* grad, const float* weight, const float* scale, const float* zero,
                         float* d_weight, float* d_scale, float* d_zero, int64_t groups, int64_t size, int bits,
                         int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t group = 0; group < groups; group++) {
        const Grid grid(scale[group], zero[group], bits);
        const float* w = weight + group * size;
        const Grad* g = grad + group * size;
        float* d = d_weight + group * size;
        float sum_scale = 0, sum_zero = 0;
#pragma omp simd reduction(+ : sum_scale, sum_zero)
        for (int64_t i = 0; i < size; i++) {
            float ratio = w[i] / grid.scale, rounded = rintf(ratio), out = load(g + i);
            float step = clamp(rounded, grid.lowest, grid.highest);
            float inside = float((rounded >= grid.lowest) & (rounded <= grid.highest));  // && would not vectorize
            float passed = out * inside;  // a product: what is not finite in `out` is not hidden by a mask
            d[i] = passed;
            sum_scale += (step - ratio * inside) * out;
            sum_zero += passed - out;
        }
        d_scale[group] = sum_scale;
        d_zero[group] = sum_zero * grid.scale;
    }
}

// Eight codes of BITS bits from the lowest bits of `word`, after the first `skip`.
template <int BITS> inline Ints decode(uint32_t word, uint32_t skip = 0) {
    const Words shifts = {0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS};
    return Ints(((Words{} + word) >> (shifts + skip)) & ((1u << BITS) - 1));
}

inline uint32_t load_word(const uint8_t* from) {
    uint32_t word;
    memcpy(&word, from, 4);
    return word;
}

inline Ints decode_bytes(const uint8_t* from) {
    const Words shifts = {0, 8, 16, 24, 0, 8, 16, 24};
    const uint32_t low = load_word(from), high = load_word(from + 4);
    const Words words = {low, low, low, low, high, high, high, high};
    return Ints((words >> shifts) & 0xff);
}

// The eight codes that start at `from`. Reads no byte more: there may be none.
template <int BITS> inline Ints decode_unit(const uint8_t* from) {
    if (BITS == 8) return decode_bytes(from);
    if (BITS == 4) return decode<BITS>(load_word(from));
    return decode<BITS>(from[0] | from[1] << 8 | (BITS == 3 ? from[2] << 16 : 0));
}

// Unit 0 to 3 of the 32 codes that start at `from`, which are BITS whole words: one load each, for the last from up to
// two bytes before its own.
template <int BITS> inline Ints decode_of_four(const uint8_t* from, int unit) {
    if (BITS == 8) return decode_bytes(from + unit * BITS);
    const int start = unit * BITS, last = 4 * BITS - 4, first = start < last ? start : last;
    return decode<BITS>(load_word(from + first), 8 * (start - first));
}

inline float sum(const Floats& v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

template <int BITS, typename Out>
void dequantize(const uint8_t* packed, const float* scale, const uint8_t* zero, Out* out, int64_t rows, int64_t groups,
                int64_t size, int64_t row_bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        const uint8_t* row = packed + n * row_bytes;
        Out* o = out + n * groups * size;
        for (int64_t unit = 0, group = 0; group < groups; group++) {
            const float s = scale[n * groups + group];
            const int32_t z = zero[n * groups + group];
            for (int64_t i = 0; i < size; i += LANES, unit++, o += LANES) {
                const Floats values = __builtin_convertvector(decode_unit<BITS>(row + unit * BITS) - z, Floats) * s;
                for (int lane = 0; lane < LANES; lane++) store(values[lane], o + lane);
            }
        }
    }
}

inline void multiply(Floats& sum, const Floats& codes, const float* from) {
    Floats x;
    memcpy(&x, from, sizeof(x));
    sum += codes * x;
}

// y [M, N] for M = COUNT rows of x [M, K]: a code is decoded once for all of them. Sums run in four chains at least,
// because one waits for its last addition. The zero point is taken out of them: sum((q - z) x) = sum(q x) - z sum(x).
template <int BITS, int COUNT>
void matmul(const float* x, const uint8_t* packed, const float* scale, const uint8_t* zero, float* y, int64_t rows,
            int64_t groups, int64_t size, int64_t row_bytes, int threads) {
    const int CHAINS = COUNT < 4 ? 4 / COUNT : 1;
    const int64_t columns = groups * size, units = size / LANES;
    std::vector<float> sums(COUNT * groups);
    for (int64_t group = 0; group < COUNT * groups; group++)
        for (int64_t i = 0; i < size; i++) sums[group] += x[group * size + i];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        const uint8_t* row = packed + n * row_bytes;
        Floats total[COUNT] = {};
        float shift[COUNT] = {};
        for (int64_t group = 0; group < groups; group++) {
            const float s = scale[n * groups + group], z = zero[n * groups + group] * s;
            const float* from = x + group * size;
            Floats inner[COUNT][CHAINS] = {};
            int64_t unit = 0;
            if (size % 32 == 0)  // then groups start at whole words
                for (; unit < units; unit += 4)
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) {
                        const Ints codes = decode_of_four<BITS>(row + (group * units + unit) * BITS, i);
                        const Floats values = __builtin_convertvector(codes, Floats);
                        for (int m = 0; m < COUNT; m++)
                            multiply(inner[m][i % CHAINS], values, from + m * columns + (unit + i) * LANES);
                    }
            for (; unit < units; unit++) {
                const Ints codes = decode_unit<BITS>(row + (group * units + unit) * BITS);
                const Floats values = __builtin_convertvector(codes, Floats);
                for (int m = 0; m < COUNT; m++) multiply(inner[m][0], values, from + m * columns + unit * LANES);
            }
            for (int m = 0; m < COUNT; m++) {
                Floats whole = inner[m][0];
                for (int chain = 1; chain < CHAINS; chain++) whole += inner[m][chain];
                total[m] += whole * s;
                shift[m] += z * sums[m * groups + group];
            }
        }
        for (int m = 0; m < COUNT; m++) y[m * rows + n] = sum(total[m]) - shift[m];
    }
}

template <int BITS>
void matmul_rows(const float* x, const uint8_t* packed, const float* scale, const uint8_t* zero, float* y,
                 int64_t count, int64_t rows, int64_t groups, int64_t size, int64_t row_bytes, int threads) {
    const int64_t columns = groups * size;
    int64_t m = 0;
    for (; m + 4 <= count; m += 4)
        matmul<BITS, 4>(x + m * columns, packed, scale, zero, y + m * rows, rows, groups, size, row_bytes, threads);
    if (m + 2 <= count) {
        matmul<BITS, 2>(x + m * columns, packed, scale, zero, y + m * rows, rows, groups, size, row_bytes, threads);
        m += 2;
    }
    if (m < count)
        matmul<BITS, 1>(x + m * columns, packed, scale, zero, y + m * rows, rows, groups, size, row_bytes, threads);
}

template <typename Out>
void dequantize_bits(const uint8_t* packed, const float* scale, const uint8_t* zero, Out* out, int64_t rows,
                     int64_t groups, int64_t size, int64_t row_bytes, int bits, int threads) {
    switch (bits) {
        case 2: return dequantize<2>(packed, scale, zero, out, rows, groups, size, row_bytes, threads);
        case 3: return dequantize<3>(packed, scale, zero, out, rows, groups, size, row_bytes, threads);
        case 4: return dequantize<4>(packed, scale, zero, out, rows, groups, size, row_bytes, threads);
        case 8: return dequantize<8>(packed, scale, zero, out, rows, groups, size, row_bytes, threads);
    }
}

}  // namespace

extern "C" {

// weight, out: [groups, size]; scale, zero: [groups]. bf16: whether out is bfloat16, else float.
void qat_fake_quant(const float* weight, const float* scale, const float* zero, void* out, int bf16, int64_t groups,
                    int64_t size, int bits, int threads) {
    if (bf16)
        fake_quant(weight, scale, zero, static_cast<bfloat16*>(out), groups, size, bits, threads);
    else
        fake_quant(weight, scale, zero, static_cast<float*>(out), groups, size, bits, threads);
}

// As above; bf16: whether grad is bfloat16.
void qat_fake_quant_backward(const void* grad, const float* weight, const float* scale, const float* zero,
                             float* d_weight, float* d_scale, float* d_zero, int bf16, int64_t groups, int64_t size,
                             int bits, int threads) {
    if (bf16)
        fake_quant_backward(static_cast<const bfloat16*>(grad), weight, scale, zero, d_weight, d_scale, d_zero, groups,
                            size, bits, threads);
    else
        fake_quant_backward(static_cast<const float*>(grad), weight, scale, zero, d_weight, d_scale, d_zero, groups,
                            size, bits, threads);
}

// packed: [rows, row_bytes]; scale, zero: [rows, groups]; out: [rows, groups * size]. size is a multiple of 8.
void qat_dequantize(const uint8_t* packed, const float* scale, const uint8_t* zero, void* out, int bf16, int64_t rows,
                    int64_t groups, int64_t size, int64_t row_bytes, int bits, int threads) {
    if (bf16)
        dequantize_bits(packed, scale, zero, static_cast<bfloat16*>(out), rows, groups, size, row_bytes, bits, threads);
    else
        dequantize_bits(packed, scale, zero, static_cast<float*>(out), rows, groups, size, row_bytes, bits, threads);
}

// x: [count, groups * size]; y: [count, rows]; the weight as above.
void qat_matmul(const float* x, const uint8_t* packed, const float* scale, const uint8_t* zero, float* y,
                int64_t count, int64_t rows, int64_t groups, int64_t size, int64_t row_bytes, int bits, int threads) {
    switch (bits) {
        case 2: return matmul_rows<2>(x, packed, scale, zero, y, count, rows, groups, size, row_bytes, threads);
        case 3: return matmul_rows<3>(x, packed, scale, zero, y, count, rows, groups, size, row_bytes, threads);
        case 4: return matmul_rows<4>(x, packed, scale, zero, y, count, rows, groups, size, row_bytes, threads);
        case 8: return matmul_rows<8>(x, packed, scale, zero, y, count, rows, groups, size, row_bytes, threads);
    }
}

}  // extern "C"
