//! The gate of TopK SAEs: for every token the k-th largest of all its rivals, without keeping them.
//!
//! A worker takes some tokens through all rivals, a chunk of dot products at a time, and keeps the
//! largest of each token: values above the k-th largest so far go into a list of 2k or more, which
//! is cut back to its k largest whenever it is full. What is left is the k largest values, in
//! whatever order they came: so the threshold depends on the token alone. Dot products are those of
//! the blocked rows, bit for bit, so that a latent compares with its own value exactly.

use std::ops::Range;

use super::encode::{Converted, dots};
use super::lanes::{Isa, LANES, Lanes, Line, Work, with_element, with_lanes};
use super::norm::TokenScale;
use super::pack::{PANEL, Panels, f32_lines, pack_f32};
use super::slab::Kernels;
use super::threads::Threads;
use crate::backend::glu::Glu;
use crate::backend::{
    Gate, Mask, Matrix, RIVALS_AT_ONCE, ReadRivals, Rows, TopK, Workspace, bounded, kth_largest,
    rank_threshold, side_by_side,
};
use crate::error::{Result, bail};
use crate::sae::TokenNorm;
use crate::tensor::DType;

/// Tokens that a worker takes through the rivals' rows together.
const TOKENS: usize = 96;
/// Rivals whose dot products are kept at a time.
const CHUNK: usize = 256;
const _: () = assert!(CHUNK.is_multiple_of(PANEL) && RIVALS_AT_ONCE.is_multiple_of(PANEL));

/// All rivals' rows, packed.
pub(super) struct OwnedRivals {
    lines: Vec<Line>,
    bias: Vec<f32>,
    glu_bias: Option<Vec<f32>>,
    gain: Option<Vec<f32>>,
    d_in: usize,
}

impl OwnedRivals {
    /// `blocked` are of the same SAE.
    pub fn pack(count: usize, blocked: &Rows<'_>, read: ReadRivals<'_>) -> Result<OwnedRivals> {
        let d_in = blocked.d_in;
        let mut lines = Vec::new();
        if lines.try_reserve_exact(f32_lines(count * blocked.width(), d_in)).is_err() {
            bail!(
                OutOfMemory,
                "{count} latents of {d_in} inputs do not fit into memory; a topk SAE's 'native' \
                 activation needs them all ('dense_relu' needs the blocked ones alone)"
            );
        }
        let (mut bias, mut glu_bias, mut gain) = (Vec::with_capacity(count), None, None);
        for start in (0..count).step_by(RIVALS_AT_ONCE) {
            let some = read(start..count.min(start + RIVALS_AT_ONCE))?;
            let (weight, some_glu_bias) = side_by_side(some.weight, some.glu, d_in);
            let rows = Rows {
                d_in,
                weight: &weight,
                weight_stride: d_in,
                bias: &some.bias,
                scale: None,
                glu_bias: some_glu_bias.as_deref(),
                norm: TokenNorm::None,
                gate: Gate::Open,
                sign_weight: &[],
            };
            let first = lines.len();
            lines.resize(first + f32_lines(rows.products(), d_in), Line([0.0; LANES]));
            pack_f32(&rows, &mut lines[first..]);
            bias.extend(some.bias);
            if let Some(some) = some_glu_bias {
                glu_bias.get_or_insert_with(Vec::new).extend(some);
            }
            if let Some(some) = some.rank_gain {
                gain.get_or_insert_with(Vec::new).extend(some);
            }
        }
        Ok(OwnedRivals { lines, bias, glu_bias, gain, d_in })
    }

    pub fn borrow(&self) -> Rivals<'_> {
        let panels = Panels::f32(&self.lines, self.d_in);
        Rivals {
            panels,
            bias: &self.bias,
            glu_bias: self.glu_bias.as_deref(),
            gain: self.gain.as_deref(),
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Rivals<'a> {
    pub panels: Panels<'a>,
    pub bias: &'a [f32],
    /// Of a GLU encoder, whose rivals have two rows each.
    pub glu_bias: Option<&'a [f32]>,
    pub gain: Option<&'a [f32]>,
}

/// The part of a workspace that a TopK gate needs: thresholds of all tokens, then each worker's
/// ranks and largest values.
#[derive(Clone, Copy)]
pub(super) struct Space {
    thresholds: *mut f32,
    groups: usize,
    scratch: *mut f32,
    /// Products of a chunk.
    products: usize,
    capacity: usize,
}

// SAFETY: workers write disjoint parts: thresholds of their tokens, scratch of their own.
unsafe impl Sync for Space {}

impl Space {
    /// Where each rival has so many rows.
    pub fn bytes(gate: &TopK, width: usize, tokens: usize, workers: usize) -> usize {
        bounded(gate.groups(), tokens, || {
            let workers = workers.min(task_count(tokens));
            Space::threshold_bytes(gate, tokens)
                + workers * TOKENS * (CHUNK * width + capacity(gate)) * size_of::<f32>()
        })
    }

    fn threshold_bytes(gate: &TopK, tokens: usize) -> usize {
        (tokens * gate.groups() * size_of::<f32>()).next_multiple_of(size_of::<Line>())
    }

    /// The head of a workspace, and the rest of it.
    pub fn split(
        space: Workspace,
        gate: &TopK,
        [width, tokens]: [usize; 2],
        workers: usize,
    ) -> (Space, Workspace) {
        let scratch = space.data.wrapping_add(Space::threshold_bytes(gate, tokens)).cast();
        let own = Space {
            thresholds: space.data.cast(),
            groups: gate.groups(),
            scratch,
            products: CHUNK * width,
            capacity: capacity(gate),
        };
        let used = Space::bytes(gate, width, tokens, workers);
        let rest = Workspace { data: space.data.wrapping_add(used), size: space.size - used };
        (own, rest)
    }

    /// A token's thresholds, one for each group.
    ///
    /// # Safety
    /// [`Kernels::find_thresholds`] has written them.
    pub unsafe fn thresholds<'a>(&self, token: usize) -> &'a [f32] {
        // SAFETY: the workspace has room for every token's.
        unsafe { std::slice::from_raw_parts(self.thresholds.add(token * self.groups), self.groups) }
    }

    /// The ranks, and the products before them, and the largest values of a worker's token.
    unsafe fn scratch<'a>(&self, worker: usize, token: usize) -> (&'a mut [f32], &'a mut [f32]) {
        let row = (worker * TOKENS + token) * (self.products + self.capacity);
        // SAFETY: the workspace has room for every worker's tokens, and it alone uses them.
        unsafe {
            let row = self.scratch.add(row);
            (
                std::slice::from_raw_parts_mut(row, self.products),
                std::slice::from_raw_parts_mut(row.add(self.products), self.capacity),
            )
        }
    }
}

/// Values that a token's list holds, at least twice as many as it needs.
fn capacity(gate: &TopK) -> usize {
    (2 * gate.k).next_multiple_of(4 * LANES)
}

fn task_count(tokens: usize) -> usize {
    tokens.div_ceil(TOKENS)
}

impl Kernels<'_> {
    /// Writes the thresholds of all tokens that count: a latent is on if its rank is above.
    ///
    /// # Safety
    /// As [`super::Backend`]; the rivals are the gate's, and the space was made for it.
    pub unsafe fn find_thresholds(
        &self,
        threads: &Threads,
        gate: &TopK,
        rivals: &Rivals<'_>,
        tokens: &Tokens,
        space: &Space,
    ) {
        let rows = gate.rivals() * self.rows.width();
        let cost = tokens.count.saturating_mul(rows).saturating_mul(self.rows.d_in);
        threads.each(task_count(tokens.count), cost, |worker, task| {
            let range = task * TOKENS..tokens.count.min((task + 1) * TOKENS);
            let block = Block { kernels: self, gate, rivals, tokens, space, worker };
            // SAFETY: the caller's promise; every task has tokens of its own.
            unsafe { block.find_thresholds(range) }
        });
    }
}

/// The tokens of a call.
pub(super) struct Tokens {
    pub count: usize,
    pub hidden: Matrix,
    pub mask: Option<Mask>,
}

// SAFETY: workers only read them.
unsafe impl Sync for Tokens {}

struct Block<'a> {
    kernels: &'a Kernels<'a>,
    gate: &'a TopK,
    rivals: &'a Rivals<'a>,
    tokens: &'a Tokens,
    space: &'a Space,
    worker: usize,
}

/// What is known of a token on its way through the rivals.
#[derive(Clone, Copy)]
struct State {
    token: usize,
    scale: f32,
    /// Values in its list, and what a value must be above to enter.
    len: usize,
    floor: f32,
}

impl Block<'_> {
    unsafe fn find_thresholds(&self, range: Range<usize>) {
        let mut states = [State { token: 0, scale: 1.0, len: 0, floor: 0.0 }; TOKENS];
        let mut hidden = [std::ptr::null(); TOKENS];
        let mut dot = [std::ptr::null_mut(); TOKENS];
        let mut live = 0;
        let Kernels { isa, rows, .. } = *self.kernels;
        // SAFETY: the caller's promise: the tokens exist, and the scratch is this worker's.
        unsafe {
            for token in range {
                if self.tokens.mask.is_some_and(|mask| mask.get(token) == 0.0) {
                    continue;
                }
                hidden[live] = self.tokens.hidden.row(token).cast_const();
                dot[live] = self.space.scratch(self.worker, live).0.as_mut_ptr();
                let dtype = self.tokens.hidden.dtype;
                let scale = TokenScale::of(isa, rows.norm, dtype, hidden[live], rows.d_in).scale;
                states[live] = State { token, scale, len: 0, floor: f32::NEG_INFINITY };
                live += 1;
            }
            let states = &mut states[..live];
            let mut group = 0;
            for start in (0..self.gate.rivals()).step_by(CHUNK) {
                let chunk = start..self.gate.rivals().min(start + CHUNK);
                self.dots(&chunk, &hidden[..live], &dot[..live]);
                for (i, state) in states.iter().enumerate() {
                    let (ranks, _) = self.space.scratch(self.worker, i);
                    let work = Ranks {
                        row: &mut ranks[..chunk.len() * rows.width()],
                        bias: &self.rivals.bias[chunk.clone()],
                        glu_bias: self.rivals.glu_bias.map(|bias| &bias[chunk.clone()]),
                        gain: self.rivals.gain.map(|gain| &gain[chunk.clone()]),
                        scale: state.scale,
                        by_magnitude: self.gate.by_magnitude,
                    };
                    with_lanes!(isa, L => L::enter(work));
                }
                // The chunk may end some groups and begin another.
                let mut at = start;
                while at < chunk.end {
                    let end = self.gate.group_ends[group];
                    self.keep(states, at - start..end.min(chunk.end) - start, isa);
                    at = end.min(chunk.end);
                    if at == end {
                        self.end_group(states, group);
                        group += 1;
                    }
                }
            }
        }
    }

    /// weight · hidden of a chunk of rivals.
    unsafe fn dots(&self, chunk: &Range<usize>, hidden: &[*const u8], out: &[*mut f32]) {
        let width = self.kernels.rows.width();
        let panels = self.rivals.panels.starting_at(chunk.start * width);
        let (d_in, count) = (self.kernels.rows.d_in, chunk.len() * width);
        let dtype: DType = self.tokens.hidden.dtype;
        // SAFETY: the caller's promise; `isa` is one that this machine has.
        unsafe {
            with_lanes!(self.kernels.isa, L => with_element!(dtype, E => {
                dots::<Converted<L, E>>(&panels, d_in, count, hidden, out)
            }))
        }
    }

    /// Enters a range of the chunk's ranks into the tokens' lists.
    unsafe fn keep(&self, states: &mut [State], range: Range<usize>, isa: Isa) {
        for (i, state) in states.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let (ranks, list) = self.space.scratch(self.worker, i);
                let work = Keep { ranks: &ranks[range.clone()], list, k: self.gate.k, state };
                with_lanes!(isa, L => L::enter(work));
            }
        }
    }

    unsafe fn end_group(&self, states: &mut [State], group: usize) {
        for (i, state) in states.iter_mut().enumerate() {
            // SAFETY: the caller's promise; the token is this worker's.
            unsafe {
                let (_, list) = self.space.scratch(self.worker, i);
                let kth = kth_largest(&mut list[..state.len], self.gate.k);
                let out = self.space.thresholds.add(state.token * self.space.groups + group);
                *out = rank_threshold(kth, self.gate.by_magnitude);
            }
            (state.len, state.floor) = (0, f32::NEG_INFINITY);
        }
    }
}

/// Turns dot products into what places a latent in its group, at the head of the same memory; NaN
/// comes first.
struct Ranks<'a> {
    row: &'a mut [f32],
    bias: &'a [f32],
    glu_bias: Option<&'a [f32]>,
    gain: Option<&'a [f32]>,
    scale: f32,
    by_magnitude: bool,
}

impl Work for Ranks<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run(self) {
        let row = match self.glu_bias {
            None => {
                for (x, bias) in self.row.iter_mut().zip(self.bias) {
                    *x = *x * self.scale + bias;
                }
                self.row
            }
            Some(glu_bias) => {
                for (i, (bias, glu_bias)) in self.bias.iter().zip(glu_bias).enumerate() {
                    let (value, gate) = (self.row[2 * i], self.row[2 * i + 1]);
                    let (value, gate) = (value * self.scale, gate * self.scale);
                    self.row[i] = Glu::of(value + bias, gate + glu_bias).pre();
                }
                &mut self.row[..self.bias.len()]
            }
        };
        if let Some(gain) = self.gain {
            for (x, gain) in row.iter_mut().zip(gain) {
                *x *= gain;
            }
        }
        for x in row {
            let rank = if self.by_magnitude { x.abs() } else { *x };
            *x = if rank.is_nan() { f32::INFINITY } else { rank };
        }
    }
}

/// Takes the ranks above the floor into the list.
struct Keep<'a> {
    ranks: &'a [f32],
    list: &'a mut [f32],
    k: usize,
    state: &'a mut State,
}

impl Work for Keep<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run(self) {
        let Keep { ranks, list, k, state } = self;
        for line in ranks.chunks(LANES) {
            let mut any = false;
            for rank in line {
                any |= *rank > state.floor;
            }
            // Soon hardly any line holds one.
            if !any {
                continue;
            }
            for rank in line {
                if *rank > state.floor {
                    list[state.len] = *rank;
                    state.len += 1;
                }
            }
            if state.len + LANES > list.len() {
                state.floor = kth_largest(&mut list[..state.len], k);
                state.len = k;
            }
        }
    }
}
