//! Hidden states pushed along directions, sixteen columns at a time: fma in f32, rounded once more
//! where hidden states are narrower. A position's bits depend on nothing but itself.

use std::marker::PhantomData;

use super::lanes::{Element, Isa, LANES, Lanes, Line, Work, with_element, with_lanes};
use super::norm::token_norm;
use super::slab::Shared;
use super::threads::Threads;
use crate::backend::{Directions, SteerBackend, SteerCall, TokenNormsCall};
use crate::error::Result;
use crate::tensor::{DType, Stream};

/// Tokens of a task.
const BLOCK: usize = 16;

/// Directions, each from a new line on, and threads.
pub(crate) struct CpuSteering {
    isa: Isa,
    d_in: usize,
    directions: Box<[Line]>,
    threads: Threads,
}

impl CpuSteering {
    /// `num_threads` 0 means one for each available core.
    pub fn new(directions: &Directions, num_threads: usize) -> CpuSteering {
        CpuSteering::with_isa(directions, num_threads, Isa::detect())
    }

    pub(super) fn with_isa(directions: &Directions, num_threads: usize, isa: Isa) -> CpuSteering {
        let lines = (0..directions.count()).flat_map(|n| directions.row(n).chunks(LANES));
        let line = |part: &[f32]| {
            let mut line = Line([0.0; LANES]);
            line.0[..part.len()].copy_from_slice(part);
            line
        };
        CpuSteering {
            isa,
            d_in: directions.d_in,
            directions: lines.map(line).collect(),
            threads: Threads::pool(num_threads),
        }
    }

    fn direction(&self, n: usize) -> *const Line {
        self.directions[n * self.d_in.div_ceil(LANES)..].as_ptr()
    }
}

impl SteerBackend for CpuSteering {
    fn num_threads(&self) -> usize {
        self.threads.count()
    }

    unsafe fn steer(&self, call: &SteerCall, _: Stream) -> Result<()> {
        let tokens = call.batch * call.positions;
        let call = Shared(*call);
        self.threads.each(tokens.div_ceil(BLOCK), tokens * self.d_in, |_, task| {
            let Shared(call) = &call;
            for t in task * BLOCK..tokens.min((task + 1) * BLOCK) {
                let (b, s) = (t / call.positions, t % call.positions);
                // SAFETY: the caller's promise: position (b, s) exists, belongs to this task alone,
                // and its row is one of the directions.
                unsafe {
                    let Some((row, factor)) = call.push(b, s) else { continue };
                    let hidden = call.hidden_of(b);
                    let (factor, direction) = (factor as f32, self.direction(row));
                    with_lanes!(self.isa, L => with_element!(hidden.dtype, E => {
                        L::enter(Push::<L, E> {
                            hidden: hidden.row(s),
                            direction,
                            d_in: self.d_in,
                            factor,
                            types: PhantomData,
                        })
                    }));
                }
            }
        });
        Ok(())
    }
}

/// h += factor · direction, for one position.
struct Push<L, E> {
    hidden: *mut u8,
    direction: *const Line,
    d_in: usize,
    factor: f32,
    types: PhantomData<(L, E)>,
}

impl<L: Lanes, E: Element> Work for Push<L, E> {
    type Out = ();

    #[inline(always)]
    unsafe fn run(self) {
        // What is left of a strength below f32's range adds nothing.
        if self.factor == 0.0 {
            return;
        }
        let (whole, rest) = (self.d_in / LANES, self.d_in % LANES);
        // SAFETY: the caller's promise: d_in elements of hidden, lines that hold d_in of the
        // direction.
        unsafe {
            let factor = L::splat(self.factor);
            for i in 0..whole {
                let at = self.hidden.add(i * LANES * E::BYTES);
                push::<L, E>(at, factor, self.direction.add(i));
            }
            if rest > 0 {
                let mut line = Line([0.0; LANES]);
                let line = (&raw mut line).cast::<u8>();
                let at = self.hidden.add(whole * LANES * E::BYTES);
                at.copy_to_nonoverlapping(line, rest * E::BYTES);
                push::<L, E>(line, factor, self.direction.add(whole));
                line.copy_to_nonoverlapping(at, rest * E::BYTES);
            }
        }
    }
}

/// Sixteen columns.
#[inline(always)]
unsafe fn push<L: Lanes, E: Element>(at: *mut u8, factor: L::V, direction: *const Line) {
    // SAFETY: the caller's promise: sixteen elements at `at`, a line of the direction.
    unsafe {
        let direction = L::load(direction.cast());
        E::store::<L>(at, L::fma(factor, direction, E::load::<L>(at)));
    }
}

/// # Safety
/// As [`crate::backend::Backend`].
pub(crate) unsafe fn token_norms(call: &TokenNormsCall, num_threads: usize) {
    let (isa, tasks) = (Isa::detect(), call.tokens.div_ceil(BLOCK));
    let call = Shared(*call);
    Threads::scoped(num_threads).each(tasks, call.0.tokens * call.0.d_in, |_, task| {
        let Shared(call) = &call;
        for t in task * BLOCK..call.tokens.min((task + 1) * BLOCK) {
            let (dtype, d_in) = (call.hidden.dtype, call.d_in);
            // SAFETY: the caller's promise: token t exists, and its norm is this task's alone.
            unsafe { call.norms.set(t, token_norm(isa, dtype, call.hidden.row(t), d_in)) };
        }
    });
}
