//! What normalises a token: one pass over its hidden state, or two, in f64.

use std::marker::PhantomData;

use super::lanes::{Element, Isa, LANES, Lanes, Line, Work, with_element, with_lanes};
use crate::sae::TokenNorm;
use crate::tensor::DType;

/// dot = a · (W · h), whose gradient is a W − q dot (h − mean).
#[derive(Clone, Copy)]
pub(super) struct TokenScale {
    /// a
    pub scale: f32,
    pub mean: f32,
    /// q
    pub pull: f64,
}

impl TokenScale {
    pub const ONE: TokenScale = TokenScale { scale: 1.0, mean: 0.0, pull: 0.0 };

    /// # Safety
    /// The machine must have `isa`, and `hidden` d_in elements of the dtype.
    pub unsafe fn of(
        isa: Isa,
        norm: TokenNorm,
        dtype: DType,
        hidden: *const u8,
        d_in: usize,
    ) -> TokenScale {
        let d = d_in as f64;
        // SAFETY: the caller's promise.
        let squares = |mean| unsafe { squares(isa, dtype, hidden, d_in, mean) };
        match norm {
            TokenNorm::None => TokenScale::ONE,
            TokenNorm::Constant => {
                let square = squares(0.0).squares;
                let scale = (d / square).sqrt() as f32;
                TokenScale { scale, mean: 0.0, pull: 1.0 / square }
            }
            TokenNorm::Layer => {
                let mean = squares(0.0).sum / d;
                let deviation = (squares(mean).squares / (d - 1.0)).sqrt();
                let scale = 1.0 / (deviation + TokenNorm::EPS);
                let pull = scale / ((d - 1.0) * deviation);
                TokenScale { scale: scale as f32, mean: mean as f32, pull }
            }
        }
    }
}

/// ‖h‖
///
/// # Safety
/// As [`TokenScale::of`].
pub(super) unsafe fn token_norm(isa: Isa, dtype: DType, hidden: *const u8, d_in: usize) -> f64 {
    // SAFETY: the caller's promise.
    unsafe { squares(isa, dtype, hidden, d_in, 0.0) }.squares.sqrt()
}

/// # Safety
/// As [`TokenScale::of`].
unsafe fn squares(isa: Isa, dtype: DType, hidden: *const u8, d_in: usize, mean: f64) -> Sums {
    // SAFETY: the caller's promise.
    unsafe {
        with_lanes!(isa, L => with_element!(dtype, E => {
            L::enter(Squares::<L, E> { hidden, d_in, mean, types: PhantomData })
        }))
    }
}

/// Σ h and Σ (h − mean)², in sixteen chains.
struct Squares<L, E> {
    hidden: *const u8,
    d_in: usize,
    mean: f64,
    types: PhantomData<(L, E)>,
}

struct Sums {
    sum: f64,
    squares: f64,
}

impl<L: Lanes, E: Element> Work for Squares<L, E> {
    type Out = Sums;

    #[inline(always)]
    unsafe fn run(self) -> Sums {
        let (mut sums, mut squares) = ([0.0; LANES], [0.0; LANES]);
        let mut line = Line([0.0; LANES]);
        let (whole, rest) = (self.d_in / LANES, self.d_in % LANES);
        // SAFETY: the caller's promise: d_in inputs.
        unsafe {
            for i in 0..whole {
                L::store(line.0.as_mut_ptr(), E::load::<L>(self.hidden.add(i * LANES * E::BYTES)));
                add(&line.0, self.mean, &mut sums, &mut squares);
            }
            if rest > 0 {
                let end = E::load_end::<L>(self.hidden.add(whole * LANES * E::BYTES), rest);
                L::store(line.0.as_mut_ptr(), end);
                add(&line.0[..rest], self.mean, &mut sums, &mut squares);
            }
        }
        Sums { sum: sums.iter().sum(), squares: squares.iter().sum() }
    }
}

/// One input for each chain.
#[inline(always)]
fn add(line: &[f32], mean: f64, sums: &mut [f64; LANES], squares: &mut [f64; LANES]) {
    for ((h, sum), square) in line.iter().zip(sums).zip(squares) {
        let h = *h as f64;
        *sum += h;
        *square += (h - mean) * (h - mean);
    }
}
