//! The latent of a GLU encoder, from its two products: u = v σ(g), where v = dot_2k + bias and
//! g = dot_2k+1 + glu_bias.
//!
//! ```text
//! du/dv = σ(g)      du/dg = v σ(g) σ(−g)
//! ```
//!
//! In f64, from additions, multiplications and one division each, so that every machine gives the
//! same bits; kernels/glu.cuh takes the same steps.

/// One token's u, and what its coefficient becomes.
#[derive(Clone, Copy)]
pub(crate) struct Glu {
    value: f64,
    sigmoid: f64,
    /// σ(−g)
    rest: f64,
}

impl Glu {
    #[inline(always)]
    pub fn of(value: f32, gate: f32) -> Glu {
        let gate = gate as f64;
        let e = exp_of_minus(gate.abs());
        let (larger, smaller) = (1.0 / (1.0 + e), e / (1.0 + e));
        let (sigmoid, rest) = if gate < 0.0 { (smaller, larger) } else { (larger, smaller) };
        Glu { value: value as f64, sigmoid, rest }
    }

    /// u
    #[inline(always)]
    pub fn pre(self) -> f32 {
        (self.value * self.sigmoid) as f32
    }

    /// The coefficients of the two products, from that of u. One that is 0 takes no part, whatever
    /// the products are.
    #[inline(always)]
    pub fn coefs(self, coef: f32) -> [f32; 2] {
        if coef == 0.0 {
            return [0.0, 0.0];
        }
        let coef = coef as f64 * self.sigmoid;
        [coef as f32, (coef * self.value * self.rest) as f32]
    }
}

/// e^−x for x ≥ 0, to f64's precision but a few units; not below e^−700. NaN stays NaN.
#[inline(always)]
fn exp_of_minus(x: f64) -> f64 {
    // Adding it leaves a whole number in the low bits.
    const WHOLE: f64 = 1.5 * (1u64 << 52) as f64;
    // ln 2 in two terms, the first of few bits: its whole multiples are exact.
    const LN_2: [f64; 2] = [6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10];
    // 1/n!, from n = 13 down.
    const TERMS: [f64; 14] = [
        1.0 / 6_227_020_800.0,
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    let x = if x > 700.0 { -700.0 } else { -x };
    let shifted = x * std::f64::consts::LOG2_E + WHOLE;
    let n = shifted - WHOLE;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let mut sum = 0.0;
    for term in TERMS {
        sum = sum * r + term;
    }
    // 2^n: the whole number, moved to the exponent.
    sum * f64::from_bits((shifted.to_bits() << 52).wrapping_add(1f64.to_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_that_of_the_standard_library() {
        for i in 0..20_000 {
            let x = (i as f64 / 100.0).powi(2) / 57.0;
            let (ours, theirs) = (exp_of_minus(x), (-x.min(700.0)).exp());
            assert!((ours - theirs).abs() <= 1e-15 * theirs, "e^-{x}: {ours} {theirs}");
        }
        assert_eq!(exp_of_minus(0.0), 1.0);
        assert_eq!(exp_of_minus(f64::INFINITY), exp_of_minus(700.0));
        assert!(exp_of_minus(f64::NAN).is_nan());
    }

    #[test]
    fn coefficients_are_the_derivatives() {
        for (value, gate) in [(0.7, 0.3), (-2.5, 4.0), (1.5, -9.0), (3.0, 40.0), (-1.0, -60.0)] {
            let u = |v: f64, g: f64| v / (1.0 + (-g).exp());
            let (v, g) = (value as f64, gate as f64);
            let glu = Glu::of(value, gate);
            assert!((glu.pre() as f64 - u(v, g)).abs() <= 1e-7 * u(v, g).abs());
            let step = 1e-4;
            let slopes = [
                (u(v + step, g) - u(v - step, g)) / (2.0 * step),
                (u(v, g + step) - u(v, g - step)) / (2.0 * step),
            ];
            for (found, slope) in glu.coefs(2.0).into_iter().zip(slopes) {
                let slope = 2.0 * slope;
                assert!(
                    (found as f64 - slope).abs() <= 1e-6 * slope.abs() + 1e-9,
                    "{found} {slope}"
                );
            }
        }
        assert_eq!(Glu::of(f32::NAN, f32::NAN).coefs(0.0), [0.0, 0.0]);
        assert!(Glu::of(f32::NAN, 1.0).pre().is_nan() && Glu::of(1.0, f32::NAN).pre().is_nan());
    }
}
