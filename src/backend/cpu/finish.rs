//! From dot products to latents, coefficients and loss: the formulas of `penalty.rs` in f32, one
//! token at a time, the loss in f64. A dot product here is normalised already; a GLU encoder's is
//! the pre-activation itself.

use super::lanes::Work;
use crate::backend::{Gate, Rows};

/// The gate as a rule on one latent; a type for each, so that rows are finished without branches.
trait Rule: Copy {
    /// Whether latent k is off. Written so that NaN leaves it on.
    fn off(self, k: usize, dot: f32, pre: f32) -> bool;
}

#[derive(Clone, Copy)]
struct Open;

#[derive(Clone, Copy)]
struct Relu;

#[derive(Clone, Copy)]
struct Threshold<'a>(&'a [f32]);

#[derive(Clone, Copy)]
struct Gated<'a>(&'a [f32]);

#[derive(Clone, Copy)]
struct Chosen<'a> {
    /// What a rank must be above, in each group.
    thresholds: &'a [f32],
    group: &'a [u32],
    gain: Option<&'a [f32]>,
    by_magnitude: bool,
}

impl Rule for Open {
    #[inline(always)]
    fn off(self, _k: usize, _dot: f32, _pre: f32) -> bool {
        false
    }
}

impl Rule for Relu {
    #[inline(always)]
    fn off(self, _k: usize, _dot: f32, pre: f32) -> bool {
        pre <= 0.0
    }
}

impl Rule for Threshold<'_> {
    #[inline(always)]
    fn off(self, k: usize, _dot: f32, pre: f32) -> bool {
        pre <= self.0[k]
    }
}

impl Rule for Gated<'_> {
    #[inline(always)]
    fn off(self, k: usize, dot: f32, pre: f32) -> bool {
        (dot + self.0[k] <= 0.0) | (pre <= 0.0)
    }
}

impl Rule for Chosen<'_> {
    #[inline(always)]
    fn off(self, k: usize, _dot: f32, pre: f32) -> bool {
        let pre = self.gain.map_or(pre, |gain| gain[k] * pre);
        let rank = if self.by_magnitude { pre.abs() } else { pre };
        rank <= self.thresholds[self.group[k] as usize]
    }
}

macro_rules! with_rule {
    ($work:expr, $rule:ident => $body:expr) => {
        match $work.rows.gate {
            Gate::Open => {
                let $rule = Open;
                $body
            }
            Gate::Relu => {
                let $rule = Relu;
                $body
            }
            Gate::Threshold(th) => {
                let $rule = Threshold(&th[..$work.rows.count()]);
                $body
            }
            Gate::Gated(bias) => {
                let $rule = Gated(&bias[..$work.rows.count()]);
                $body
            }
            Gate::TopK(gate) => {
                let $rule = Chosen {
                    thresholds: $work.thresholds,
                    group: &gate.group[..$work.rows.count()],
                    gain: gate.gain.as_deref(),
                    by_magnitude: gate.by_magnitude,
                };
                $body
            }
        }
    };
}

#[inline(always)]
fn pre(rows: &Rows<'_>, k: usize, dot: f32) -> f32 {
    match rows.scale {
        _ if rows.glu_bias.is_some() => dot,
        Some(scale) => dot * scale[k] + rows.bias[k],
        None => dot + rows.bias[k],
    }
}

/// Normalises a token's dot products, in place.
pub(super) struct Normalize<'a> {
    pub row: &'a mut [f32],
    pub scale: f32,
}

impl Work for Normalize<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run(self) {
        for dot in self.row {
            *dot *= self.scale;
        }
    }
}

/// Turns a token's dot products into its latents, in place.
pub(super) struct Latents<'a> {
    pub rows: &'a Rows<'a>,
    pub row: &'a mut [f32],
    /// Of a TopK gate, one for each group.
    pub thresholds: &'a [f32],
}

impl Work for Latents<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run(self) {
        with_rule!(self, rule => for (k, x) in self.row.iter_mut().enumerate() {
            let pre = pre(self.rows, k, *x);
            *x = if rule.off(k, *x, pre) { 0.0 } else { pre };
        })
    }
}

/// A latent's part in Σ_k coef_k dot_k. One that takes no part adds nothing, whatever its product.
#[inline(always)]
pub(super) fn pull(coef: f32, dot: f32) -> f64 {
    if coef == 0.0 { 0.0 } else { coef as f64 * dot as f64 }
}

/// Turns a token's dot products into its coefficients, in place, and returns its share of the loss.
pub(super) struct Coefficients<'a> {
    pub rows: &'a Rows<'a>,
    pub row: &'a mut [f32],
    pub reference: *const f32,
    pub mask: f32,
    /// Sums over tokens, one for each latent.
    pub latent_loss: Option<&'a mut [f64]>,
    /// Of a TopK gate, one for each group.
    pub thresholds: &'a [f32],
    /// Σ_k coef_k dot_k, where a norm needs it and latents have one row.
    pub pull: Option<&'a mut f64>,
}

impl Work for Coefficients<'_> {
    type Out = f64;

    #[inline(always)]
    unsafe fn run(self) -> f64 {
        with_rule!(self, rule => self.token(rule))
    }
}

impl Coefficients<'_> {
    #[inline(always)]
    fn token(mut self, rule: impl Rule) -> f64 {
        let mut loss = 0.0;
        for k in 0..self.row.len() {
            let dot = self.row[k];
            let pre = pre(self.rows, k, dot);
            let off = rule.off(k, dot, pre);
            let z = if off { 0.0 } else { pre };
            // SAFETY: the caller gave a reference for each latent.
            let reference = unsafe { *self.reference.add(k) };
            let sw = self.rows.sign_weight[k];
            let x = if sw < 0.0 { reference - z } else { z - reference };
            let r = if x <= 0.0 { 0.0 } else { x };
            let coef = self.mask * (2.0 * sw * r) * self.rows.scale.map_or(1.0, |s| s[k]);
            self.row[k] = if off { 0.0 } else { coef };
            if let Some(sum) = &mut self.pull {
                **sum += pull(self.row[k], dot);
            }
            let share = sw.abs() as f64 * (r as f64 * r as f64);
            loss += share;
            if let Some(sums) = &mut self.latent_loss {
                sums[k] += self.mask as f64 * share;
            }
        }
        self.mask as f64 * loss
    }
}
