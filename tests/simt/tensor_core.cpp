// Products of tensor cores: bf16 with f32 sums, as far as measurements tell. Products are exact; eight
// of them and the accumulator are aligned to the largest exponent, cut off one bit below f32's last
// place there, added exactly, and cut off to f32. Later devices keep more bits.
//
// Every product of the tests comes through here: eight columns are computed at a time.
#include <math.h>
#include <string.h>

#include "simt.h"

#define EACH_COLUMN _Pragma("omp simd") for (uint32_t n = 0; n < COLUMNS; n++)

namespace {

constexpr uint32_t COLUMNS = 8;

float bf16(uint32_t half) {
    const uint32_t bits = half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

uint64_t bits_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    return bits;
}

double double_of(uint64_t bits) {
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

// To f32, towards zero.
float cut_off(double x) {
    float y = (float)x;
    uint32_t bits;
    memcpy(&bits, &y, 4);
    bits -= fabs((double)y) > fabs(x) && fabsf(y) < INFINITY;
    memcpy(&y, &bits, 4);
    return y;
}

// c[n] += eight products: a[k] · b[k][n]
void add_products(float *c, const double *a, const double (*b)[COLUMNS]) {
    double most[COLUMNS], plain[COLUMNS], sum[COLUMNS], unit[COLUMNS], inverse[COLUMNS];
    EACH_COLUMN {
        plain[n] = c[n];
        most[n] = fabs((double)c[n]);
    }
    for (uint32_t k = 0; k < 8; k++) {
        EACH_COLUMN {
            const double product = a[k] * b[k][n], size = fabs(product);
            plain[n] += product;
            most[n] = size > most[n] ? size : most[n];
        }
    }
    EACH_COLUMN {
        // Where there are zeros alone any unit will do.
        const uint64_t exponent = most[n] == 0.0 ? 1023 : bits_of(most[n]) >> 52;
        unit[n] = double_of((exponent - 24) << 52);
        inverse[n] = double_of((2046 + 24 - exponent) << 52);
        sum[n] = trunc((double)c[n] * inverse[n]);
    }
    for (uint32_t k = 0; k < 8; k++) {
        EACH_COLUMN sum[n] += trunc(a[k] * b[k][n] * inverse[n]);
    }
    EACH_COLUMN {
        const float cut = cut_off(sum[n] * unit[n]);
        c[n] = fabs(plain[n]) < (double)INFINITY ? cut : (float)plain[n];
    }
}

// One lane's part of 16 rows of A.
void gather(double (&a)[16][16], uint32_t lane, const uint32_t *from) {
    const uint32_t g = lane / 4, q = lane % 4;
    for (uint32_t i = 0; i < 2; i++) {
        for (uint32_t part = 0; part < 4; part++) {
            a[g + part % 2 * 8][2 * q + i + part / 2 * 8] = bf16(from[part] >> 16 * i & 0xffff);
        }
    }
}

// c += a · b, of 16 rows, 16 columns of a and 8 of b; the lanes have four numbers of c each.
template <typename Of>
void multiply_tile(const double (&a)[16][16], const double (&b)[16][COLUMNS], const Of &of) {
    float c[16][COLUMNS];
    const auto at = [&](uint32_t lane, uint32_t i) -> float & {
        return c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    };
    for (uint32_t lane = 0; lane < 32; lane++) {
        for (uint32_t i = 0; i < 4; i++) at(lane, i) = of(lane)[i];
    }
    for (uint32_t row = 0; row < 16; row++) {
        add_products(c[row], a[row], b);
        add_products(c[row], a[row] + 8, b + 8);
    }
    for (uint32_t lane = 0; lane < 32; lane++) {
        for (uint32_t i = 0; i < 4; i++) of(lane)[i] = at(lane, i);
    }
}

} // namespace

void simt::mma(void *const (&lanes)[32]) {
    double a[16][16], b[16][COLUMNS];
    for (uint32_t lane = 0; lane < 32; lane++) {
        const Fragments &own = *static_cast<Fragments *>(lanes[lane]);
        const uint32_t g = lane / 4, q = lane % 4;
        gather(a, lane, own.a);
        for (uint32_t i = 0; i < 2; i++) {
            for (uint32_t part = 0; part < 2; part++) {
                b[2 * q + i + part * 8][g] = bf16(own.b[part] >> 16 * i & 0xffff);
            }
        }
    }
    multiply_tile(a, b, [&](uint32_t lane) { return static_cast<Fragments *>(lanes[lane])->c; });
}

void simt::multiply(const Product *(&lanes)[32], const uint16_t *from) {
    double a[16][16], b[16][COLUMNS];
    for (uint32_t lane = 0; lane < 32; lane++) gather(a, lane, lanes[lane]->a);
    for (uint32_t tile = 0; tile < lanes[0]->tiles; tile++, from += COLUMNS * 16) {
        for (uint32_t n = 0; n < COLUMNS; n++) {
            for (uint32_t k = 0; k < 16; k++) b[k][n] = bf16(from[16 * n + k]);
        }
        multiply_tile(a, b, [&](uint32_t lane) { return lanes[lane]->c + 4 * tile; });
    }
}
