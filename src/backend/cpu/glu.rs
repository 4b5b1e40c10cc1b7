//! What a GLU encoder adds to a token: from the two products of each latent to u before the gate,
//! and from its coefficient to those of its two rows after. Products are normalised already.

use super::finish::pull;
use super::lanes::Work;
use crate::backend::Rows;
use crate::backend::glu::Glu;

/// Writes u of each latent.
pub(super) struct Preactivations<'a> {
    pub rows: &'a Rows<'a>,
    /// [2K]
    pub dots: &'a [f32],
    /// [K]
    pub row: &'a mut [f32],
}

impl Work for Preactivations<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run(self) {
        let pairs = self.row.iter_mut().zip(self.dots.as_chunks::<2>().0);
        for ((u, [value, gate]), (bias, glu_bias)) in pairs.zip(biases(self.rows)) {
            *u = Glu::of(value + bias, gate + glu_bias).pre();
        }
    }
}

/// Turns products into the coefficients of their rows, in place; returns Σ coef · product.
pub(super) struct RowCoefficients<'a> {
    pub rows: &'a Rows<'a>,
    /// [K]
    pub coef: &'a [f32],
    /// [2K]
    pub dots: &'a mut [f32],
}

impl Work for RowCoefficients<'_> {
    type Out = f64;

    #[inline(always)]
    unsafe fn run(self) -> f64 {
        let pairs = self.coef.iter().zip(self.dots.as_chunks_mut::<2>().0);
        let mut sum = 0.0;
        for ((coef, pair), (bias, glu_bias)) in pairs.zip(biases(self.rows)) {
            let [value, gate] = *pair;
            *pair = Glu::of(value + bias, gate + glu_bias).coefs(*coef);
            sum += pull(pair[0], value);
            sum += pull(pair[1], gate);
        }
        sum
    }
}

/// Of each latent: its value's and its gate's.
#[inline(always)]
fn biases<'a>(rows: &Rows<'a>) -> impl Iterator<Item = (&'a f32, &'a f32)> {
    rows.bias.iter().zip(rows.glu_bias.unwrap_or_default())
}
