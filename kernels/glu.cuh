// The latent of a GLU encoder, from the two products of its rows: u = v · σ(g). In f64 and step by step
// as src/backend/glu.rs has it.
#pragma once

#include "device.cuh"

// e^−x for x >= 0, not below e^−700. NaN stays NaN.
DEVICE double exp_of_minus(double x) {
    // Adding it leaves a whole number in the low bits.
    const double whole = 6755399441055744.0;
    // 1/n!, from n = 13 down.
    const double terms[14] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0,
                              1.0 / 3628800.0,    1.0 / 362880.0,    1.0 / 40320.0,
                              1.0 / 5040.0,       1.0 / 720.0,       1.0 / 120.0,
                              1.0 / 24.0,         1.0 / 6.0,         0.5,
                              1.0,                1.0};
    x = x > 700.0 ? -700.0 : -x;
    const double shifted = add_rn(mul_rn(x, 1.4426950408889634), whole);
    const double n = add_rn(shifted, -whole);
    const double r = add_rn(add_rn(x, -mul_rn(n, 6.931471803691238e-1)),
                            -mul_rn(n, 1.9082149292705877e-10));
    double sum = 0.0;
    UNROLL
    for (int i = 0; i < 14; i++) sum = add_rn(mul_rn(sum, r), terms[i]);
    // 2^n: the whole number, moved to the exponent.
    return mul_rn(sum, double_of_bits((bits_of_double(shifted) << 52) + (1023ull << 52)));
}

struct Glu {
    // σ(−g) is the rest.
    double value, sigmoid, rest;

    DEVICE_MEMBER Glu(float value, float gate) : value(value) {
        const double g = gate, e = exp_of_minus(fabs(g)), sum = add_rn(1.0, e);
        const double larger = 1.0 / sum, smaller = e / sum;
        sigmoid = g < 0.0 ? smaller : larger;
        rest = g < 0.0 ? larger : smaller;
    }

    // u
    DEVICE_MEMBER float pre() const { return (float)mul_rn(value, sigmoid); }

    // The coefficients of the two products, from that of u, which is not 0.
    DEVICE_MEMBER FloatPair coefs(float coef) const {
        const double scaled = mul_rn((double)coef, sigmoid);
        return {(float)scaled, (float)mul_rn(mul_rn(scaled, value), rest)};
    }
};
