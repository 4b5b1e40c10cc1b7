//! What normalises a token: one pass over its hidden state, or two, in f64.

use std::marker::PhantomData;

use super::lanes::{Element, Isa, LANES, Lanes, Work, with_element, with_lanes};
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
            L::enter(Squares::<E> { hidden, d_in, mean, element: PhantomData })
        }))
    }
}

/// Σ h and Σ (h − mean)², in sixteen chains.
struct Squares<E> {
    hidden: *const u8,
    d_in: usize,
    mean: f64,
    element: PhantomData<E>,
}

struct Sums {
    sum: f64,
    squares: f64,
}

impl<E: Element> Work for Squares<E> {
    type Out = Sums;

    #[inline(always)]
    unsafe fn run(self) -> Sums {
        let (mut sums, mut squares) = ([0.0; LANES], [0.0; LANES]);
        let mut add = |lane: usize, i: usize| {
            // SAFETY: the caller's promise: i < d_in.
            let h = unsafe { E::widen(self.hidden.add(i * E::BYTES)) } as f64;
            sums[lane] += h;
            squares[lane] += (h - self.mean) * (h - self.mean);
        };
        let whole = self.d_in / LANES * LANES;
        for start in (0..whole).step_by(LANES) {
            for lane in 0..LANES {
                add(lane, start + lane);
            }
        }
        for i in whole..self.d_in {
            add(i - whole, i);
        }
        Sums { sum: sums.iter().sum(), squares: squares.iter().sum() }
    }
}
