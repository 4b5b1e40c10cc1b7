//! Encoder rows in the order in which the kernels read them: panels of four rows, line by line, so
//! that a tile streams through memory and no two rows fall on the same cache sets.

use half::bf16;

use super::lanes::{LANES, Line};
use crate::backend::Rows;

/// Rows of a panel.
pub(super) const PANEL: usize = 4;

/// Packed rows: [panel][step][PANEL rows][`terms` lines], zero where there is no row or column. A long
/// panel ends in padding, see [`panel_lines`].
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    lines: &'a [Line],
    /// Steps along a row.
    pub steps: usize,
    /// Lines of one row in one step.
    pub terms: usize,
}

impl<'a> Panels<'a> {
    /// Lines from one step of a row to its next.
    pub fn step(&self) -> usize {
        PANEL * self.terms
    }

    /// Lines from one panel to the next.
    pub fn panel(&self) -> usize {
        panel_lines(self.steps, self.terms)
    }

    /// Row `k` from step `step` on.
    pub fn row(&self, k: usize, step: usize) -> *const Line {
        let at = k / PANEL * self.panel() + step * self.step() + k % PANEL * self.terms;
        &self.lines[at]
    }

    /// The rows from the one that begins a panel on.
    pub fn starting_at(&self, k: usize) -> Panels<'a> {
        debug_assert!(k.is_multiple_of(PANEL));
        Panels { lines: &self.lines[k / PANEL * self.panel()..], ..*self }
    }

    /// f32 panels: one line of a row holds 16 inputs.
    pub fn f32(lines: &'a [Line], d_in: usize) -> Panels<'a> {
        Panels { lines, steps: d_in.div_ceil(LANES), terms: 1 }
    }

    /// bf16 panels: two lines of a row hold 32 inputs, each in a high and a low term.
    pub fn bf16(lines: &'a [Line], d_in: usize) -> Panels<'a> {
        Panels { lines, steps: d_in.div_ceil(2 * LANES), terms: 2 }
    }
}

/// Lines from one panel to the next. Where d_in is a power of two, the same columns of all panels would
/// fall on the same sets of a cache (64 lines apart at the first level): a long panel is followed by the
/// next 16 sets on.
fn panel_lines(steps: usize, terms: usize) -> usize {
    const SETS: usize = 64;
    let lines = steps * PANEL * terms;
    if lines < 4 * SETS { lines } else { (lines - SETS / 4).next_multiple_of(SETS) + SETS / 4 }
}

/// Lines that [`pack_f32`] fills.
pub(super) fn f32_lines(count: usize, d_in: usize) -> usize {
    count.div_ceil(PANEL) * panel_lines(d_in.div_ceil(LANES), 1)
}

/// Lines that [`pack_bf16`] fills.
pub(super) fn bf16_lines(count: usize, d_in: usize) -> usize {
    count.div_ceil(PANEL) * panel_lines(d_in.div_ceil(2 * LANES), 2)
}

pub(super) fn pack_f32(rows: &Rows<'_>, lines: &mut [Line]) {
    pack(rows, lines, 1, |inputs, line| line[0].0[..inputs.len()].copy_from_slice(inputs));
}

/// Each weight rounded to bf16, and what the rounding left, rounded too.
pub(super) fn pack_bf16(rows: &Rows<'_>, lines: &mut [Line]) {
    pack(rows, lines, 2, |inputs, line| {
        let (high, low) = line.split_at_mut(1);
        let (high, low) = (pairs(&mut high[0]), pairs(&mut low[0]));
        for (i, w) in inputs.iter().enumerate() {
            high[i] = bf16::from_f32(*w);
            low[i] = bf16::from_f32(w - high[i].to_f32());
        }
    });
}

/// Zeroes the panels, then hands out the inputs of every row and step with their lines.
fn pack(rows: &Rows<'_>, lines: &mut [Line], terms: usize, put: impl Fn(&[f32], &mut [Line])) {
    lines.fill(Line([0.0; LANES]));
    let inputs = terms * LANES;
    let panel = panel_lines(rows.d_in.div_ceil(inputs), terms);
    for k in 0..rows.products() {
        for (s, inputs) in rows.row(k).chunks(inputs).enumerate() {
            let at = k / PANEL * panel + (s * PANEL + k % PANEL) * terms;
            put(inputs, &mut lines[at..at + terms]);
        }
    }
}

/// A line as 32 bf16.
fn pairs(line: &mut Line) -> &mut [bf16; 2 * LANES] {
    // SAFETY: both are 64 bytes of plain numbers, and a line is aligned beyond need.
    unsafe { &mut *std::ptr::from_mut(line).cast() }
}
