// mma.m16n8k16 of bf16 with f32 sums, as far as measurements of tensor cores tell: products are
// exact; eight of them and the accumulator are aligned to the largest exponent, cut off one bit
// below f32's last place there, added exactly, and cut off to f32. Later devices keep more bits.
#include <math.h>
#include <string.h>

#include "simt.h"

namespace {

float bf16(uint32_t half) {
    const uint32_t bits = half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

int exponent(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    return (int)(bits >> 52 & 0x7ff) - 1023;
}

double power(int exponent) {
    const uint64_t bits = (uint64_t)(exponent + 1023) << 52;
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

float cut_off(double x) {
    float y = (float)x;
    if (isinf(y) || fabs((double)y) <= fabs(x)) return y;
    uint32_t bits;
    memcpy(&bits, &y, 4);
    bits -= 1;
    memcpy(&y, &bits, 4);
    return y;
}

float add_products(float c, const double (&products)[8]) {
    int largest = exponent(c);
    double plain = c;
    for (double x : products) {
        largest = exponent(x) > largest ? exponent(x) : largest;
        plain += x;
    }
    if (!isfinite(plain)) return (float)plain;
    if (plain == 0.0 && largest < -1000) return 0.0f;
    const double unit = power(largest - 24), inverse = power(24 - largest);
    int64_t sum = (int64_t)(c * inverse);
    for (double x : products) sum += (int64_t)(x * inverse);
    return cut_off((double)sum * unit);
}

// c += row · column
void add_sixteen(float &c, const float *row, const float *column) {
    for (uint32_t k = 0; k < 16; k += 8) {
        double products[8];
        for (uint32_t j = 0; j < 8; j++) products[j] = (double)row[k + j] * column[k + j];
        c = add_products(c, products);
    }
}

// One lane's part of 16 rows of A.
void gather(float (&a)[16][16], uint32_t lane, const uint32_t *from) {
    const uint32_t g = lane / 4, q = lane % 4;
    for (uint32_t i = 0; i < 2; i++) {
        for (uint32_t part = 0; part < 4; part++) {
            a[g + part % 2 * 8][2 * q + i + part / 2 * 8] = bf16(from[part] >> 16 * i & 0xffff);
        }
    }
}

// One lane's part of a tile of accumulators.
void accumulate(float *c, uint32_t lane, const float (&a)[16][16], const float (*b)[16]) {
    for (uint32_t i = 0; i < 4; i++) {
        add_sixteen(c[i], a[lane / 4 + i / 2 * 8], b[lane % 4 * 2 + i % 2]);
    }
}

} // namespace

void simt::mma(void *const (&lanes)[32]) {
    float a[16][16], b[8][16];
    for (uint32_t lane = 0; lane < 32; lane++) {
        const Fragments &own = *static_cast<Fragments *>(lanes[lane]);
        const uint32_t g = lane / 4, q = lane % 4;
        gather(a, lane, own.a);
        for (uint32_t i = 0; i < 2; i++) {
            for (uint32_t part = 0; part < 2; part++) {
                b[g][2 * q + i + part * 8] = bf16(own.b[part] >> 16 * i & 0xffff);
            }
        }
    }
    for (uint32_t lane = 0; lane < 32; lane++) {
        accumulate(static_cast<Fragments *>(lanes[lane])->c, lane, a, b);
    }
}

void simt::multiply(const Product *(&lanes)[32], const uint16_t *b) {
    float rows[16][16], columns[8][16];
    for (uint32_t lane = 0; lane < 32; lane++) gather(rows, lane, lanes[lane]->a);
    for (uint32_t tile = 0; tile < lanes[0]->tiles; tile++) {
        for (uint32_t i = 0; i < 8 * 16; i++) columns[i / 16][i % 16] = bf16(b[tile * 128 + i]);
        for (uint32_t lane = 0; lane < 32; lane++) {
            accumulate(lanes[lane]->c + 4 * tile, lane, rows, columns);
        }
    }
}
