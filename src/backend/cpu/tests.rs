//! Kernels against a slow, obvious loop in f64, and against themselves bit for bit.

use half::{bf16, f16};

use super::lanes::{Isa, Line};
use super::{Cpu, raw_penalty};
use crate::backend::random::Random;
use crate::backend::{
    Backend, BackwardCall, EncodeCall, Gate, Grad, Mask, Matrix, Output, PenaltyCall, Rows, TopK,
    Workspace,
};
use crate::sae::{EncoderRows, GluRows, TokenNorm};
use crate::tensor::{DType, Stream};

/// A matrix in memory of its own: rows apart, the first one element off alignment if asked.
#[derive(Clone)]
struct Memory {
    lines: Vec<Line>,
    offset: usize,
    rows: usize,
    cols: usize,
    stride: usize,
    dtype: DType,
}

impl Memory {
    /// Filled with NaN.
    fn new(dtype: DType, rows: usize, cols: usize, gap: usize, offset: usize) -> Memory {
        let stride = cols + gap;
        let bytes = (rows * stride + offset) * dtype.size();
        let lines = vec![Line([f32::NAN; 16]); bytes.div_ceil(64) + 1];
        Memory { lines, offset, rows, cols, stride, dtype }
    }

    fn matrix(&self) -> Matrix {
        let data = self.lines.as_ptr().cast::<u8>().cast_mut();
        let data = data.wrapping_add(self.offset * self.dtype.size());
        Matrix { data, dtype: self.dtype, row_stride: self.stride }
    }

    fn address(&self, t: usize, i: usize) -> *mut u8 {
        assert!(t < self.rows && i < self.cols);
        // SAFETY: the row exists.
        unsafe { self.matrix().row(t).add(i * self.dtype.size()) }
    }

    fn get(&self, t: usize, i: usize) -> f32 {
        let at = self.address(t, i);
        // SAFETY: the element exists.
        unsafe {
            match self.dtype {
                DType::F16 => at.cast::<f16>().read().to_f32(),
                DType::BF16 => at.cast::<bf16>().read().to_f32(),
                _ => at.cast::<f32>().read(),
            }
        }
    }

    fn set(&mut self, t: usize, i: usize, x: f32) {
        let at = self.address(t, i);
        // SAFETY: the element exists.
        unsafe {
            match self.dtype {
                DType::F16 => at.cast::<f16>().write(f16::from_f32(x)),
                DType::BF16 => at.cast::<bf16>().write(bf16::from_f32(x)),
                _ => at.cast::<f32>().write(x),
            }
        }
    }

    fn fill(&mut self, random: &mut Random) {
        for t in 0..self.rows {
            (0..self.cols).for_each(|i| self.set(t, i, random.normal()));
        }
    }

    /// Every bit, gaps between rows included.
    fn bits(&self) -> Vec<[u32; 16]> {
        self.lines.iter().map(|line| line.0.map(f32::to_bits)).collect()
    }

    fn row(&self, t: usize) -> Vec<f32> {
        (0..self.cols).map(|i| self.get(t, i)).collect()
    }

    /// The same matrix from token `start` on.
    fn tail(&self, start: usize) -> Matrix {
        let matrix = self.matrix();
        let bytes = start * self.stride * self.dtype.size();
        Matrix { data: matrix.data.wrapping_add(bytes), ..matrix }
    }
}

#[derive(Clone, Copy, Debug)]
enum GateKind {
    Open,
    Relu,
    Threshold,
    Gated,
    TopK,
}

/// All latents of a TopK SAE, and where the blocked ones are among them.
#[derive(Clone)]
struct Dictionary {
    rows: EncoderRows,
    gate: TopK,
}

/// Inputs of every call.
#[derive(Clone)]
struct Problem {
    name: String,
    tokens: usize,
    count: usize,
    d_in: usize,
    /// Of a GLU encoder latent k has rows 2k and 2k + 1.
    weight: Vec<f32>,
    weight_stride: usize,
    bias: Vec<f32>,
    scale: Option<Vec<f32>>,
    glu_bias: Option<Vec<f32>>,
    gate: GateKind,
    gate_values: Vec<f32>,
    norm: TokenNorm,
    dictionary: Dictionary,
    sign_weight: Vec<f32>,
    hidden: Memory,
    reference: Memory,
    mask: Option<Vec<f32>>,
    grad: Memory,
    accumulate: bool,
    factor: f32,
}

impl Problem {
    fn random(random: &mut Random, tokens: usize, count: usize, d_in: usize) -> Problem {
        let dtype = random.pick(&[DType::F32, DType::BF16, DType::F16]);
        let gate = random.pick(&[
            GateKind::Open,
            GateKind::Relu,
            GateKind::Threshold,
            GateKind::Gated,
            GateKind::TopK,
        ]);
        let norm = random.pick(&[TokenNorm::None, TokenNorm::Constant, TokenNorm::Layer]);
        let norm = if d_in < 3 { TokenNorm::None } else { norm };
        let seed = *random;
        let grad_dtype = random.pick(&[DType::F32, dtype]);
        let mut memory = |dtype, cols| {
            let gap = random.pick(&[0, 1, 16, 48]);
            Memory::new(dtype, tokens, cols, gap, random.pick(&[0, 1, 16]))
        };
        let mut hidden = memory(dtype, d_in);
        let mut reference = memory(DType::F32, count);
        let mut grad = memory(grad_dtype, d_in);
        let accumulate = random.below(2) == 0;
        if accumulate {
            grad.fill(random);
        }
        hidden.fill(random);
        reference.fill(random);
        let weight_stride = d_in + random.pick(&[0, 3]);
        let glu = !matches!(gate, GateKind::Gated) && random.below(3) == 0;
        let width = if glu { 2 } else { 1 };
        let mut weight = random.rows(count * width, d_in, weight_stride, norm);
        let mut bias: Vec<f32> = random.normals(count).iter().map(|b| 0.1 * b).collect();
        let mut glu_bias = glu.then(|| random.normals(count));
        let dictionary = Dictionary::random(random, count, d_in, norm, glu);
        if let GateKind::TopK = gate {
            dictionary.place_blocked(&mut weight, weight_stride, &mut bias, &mut glu_bias);
        }
        let sign_weight = (0..count).map(|_| random.pick(&[1.0, -1.0, 0.3, -2.5])).collect();
        let mask = (random.below(2) == 0)
            .then(|| (0..tokens).map(|_| random.pick(&[0.0, 1.0, 1.0, 0.37])).collect());
        let scale = (random.below(2) == 0 && !matches!(gate, GateKind::TopK) && !glu)
            .then(|| random.normals(count).iter().map(|x| x.abs() + 0.2).collect());
        Problem {
            name: format!(
                "T {tokens}, K {count}, d {d_in}, {dtype:?} to {grad_dtype:?}, {gate:?}, {norm:?}, \
                 GLU {glu}, mask {}, accumulate {accumulate}, {seed:x?}",
                mask.is_some()
            ),
            tokens,
            count,
            d_in,
            weight,
            weight_stride,
            bias,
            scale,
            glu_bias,
            gate,
            gate_values: random.normals(count).iter().map(|b| 0.3 * b).collect(),
            norm,
            dictionary,
            sign_weight,
            hidden,
            reference,
            mask,
            grad,
            accumulate,
            factor: 0.7,
        }
    }

    fn rows(&self) -> Rows<'_> {
        Rows {
            d_in: self.d_in,
            weight: &self.weight,
            weight_stride: self.weight_stride,
            bias: &self.bias,
            scale: self.scale.as_deref(),
            glu_bias: self.glu_bias.as_deref(),
            gate: match self.gate {
                GateKind::Open => Gate::Open,
                GateKind::Relu => Gate::Relu,
                GateKind::Threshold => Gate::Threshold(&self.gate_values),
                GateKind::Gated => Gate::Gated(&self.gate_values),
                GateKind::TopK => Gate::TopK(&self.dictionary.gate),
            },
            norm: self.norm,
            sign_weight: &self.sign_weight,
        }
    }

    fn cpu(&self, threads: usize, isa: Isa) -> Cpu {
        let read = |range: std::ops::Range<usize>| {
            let EncoderRows { d_in, weight, bias, glu, rank_gain, .. } = &self.dictionary.rows;
            let rows = |weight: &[f32]| weight[range.start * d_in..range.end * d_in].to_vec();
            let glu = glu.as_ref().map(|glu| GluRows {
                weight: rows(&glu.weight),
                bias: glu.bias[range.clone()].to_vec(),
            });
            Ok(EncoderRows {
                d_in: *d_in,
                weight: rows(weight),
                bias: bias[range.clone()].to_vec(),
                glu,
                rank_gain: rank_gain.as_ref().map(|gain| gain[range].to_vec()),
                ..EncoderRows::default()
            })
        };
        Cpu::with_isa(&self.rows(), &read, threads, isa).unwrap()
    }

    /// Calls without handles know none of these.
    fn is_raw(&self) -> bool {
        let topk = matches!(self.gate, GateKind::TopK);
        self.norm == TokenNorm::None && !topk && self.glu_bias.is_none()
    }

    /// What a token's products are multiplied by, and hidden as the norm sees it.
    fn normed(&self, t: usize) -> (f64, Vec<f64>) {
        let hidden: Vec<f64> = self.hidden.row(t).into_iter().map(f64::from).collect();
        let d = self.d_in as f64;
        let square = |h: &[f64]| h.iter().map(|x| x * x).sum::<f64>();
        match self.norm {
            TokenNorm::None => (1.0, hidden),
            TokenNorm::Constant => ((d / square(&hidden)).sqrt(), hidden),
            TokenNorm::Layer => {
                let mean = hidden.iter().sum::<f64>() / d;
                let centred: Vec<f64> = hidden.iter().map(|x| x - mean).collect();
                (1.0 / ((square(&centred) / (d - 1.0)).sqrt() + 1e-5), centred)
            }
        }
    }

    /// The pre-activation of each latent of a token, and how far its gate is from switching.
    fn pre(&self, t: usize) -> Vec<(f64, f64)> {
        let (a, hidden) = self.normed(t);
        let product =
            |row: &[f32]| a * row.iter().zip(&hidden).map(|(w, h)| *w as f64 * h).sum::<f64>();
        let ranks = match self.gate {
            GateKind::TopK => self.dictionary.ranks(product),
            _ => Vec::new(),
        };
        let of_latent = |k: usize| {
            let rows = self.rows();
            let dot = product(rows.row(k * rows.width()));
            let scale = self.scale.as_ref().map_or(1.0, |s| s[k] as f64);
            let mut pre = dot * scale + self.bias[k] as f64;
            if let Some(bias) = &self.glu_bias {
                pre *= sigmoid(product(rows.row(2 * k + 1)) + bias[k] as f64);
            }
            let gate = self.gate_values[k] as f64;
            let distance = match self.gate {
                GateKind::Open => f64::INFINITY,
                GateKind::Relu => pre,
                GateKind::Threshold => pre - gate,
                GateKind::Gated => pre.min(dot + gate),
                GateKind::TopK => self.dictionary.distance(k, pre, &ranks),
            };
            (pre, distance)
        };
        (0..self.count).map(of_latent).collect()
    }

    /// The gradient of Σ_k coef_k z_k where all latents are on, and the size of its parts. Products that
    /// it depends on itself count as often as they are less exact than it.
    fn gradient(&self, t: usize, coef: &[f64], less_exact: f64) -> Vec<(f64, f64)> {
        let (a, hidden) = self.normed(t);
        let square: f64 = hidden.iter().map(|x| x * x).sum();
        // Of a: along hidden, and smaller the longer it is.
        let slope = match self.norm {
            TokenNorm::None => 0.0,
            TokenNorm::Constant => -a / square,
            TokenNorm::Layer => {
                let d = self.d_in as f64;
                -a * a / ((d - 1.0) * (square / (d - 1.0)).sqrt())
            }
        };
        let mut sum = vec![(0.0f64, 0.0f64); self.d_in];
        let rows = self.rows();
        // And the size of its products.
        let product = |row: usize| -> (f64, f64) {
            let products = rows.row(row).iter().zip(&hidden).map(|(w, h)| *w as f64 * h);
            products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
        };
        let mut add = |row: usize, coef: f64, size: f64| {
            let (dot, dot_size) = product(row);
            for (sum, (w, h)) in sum.iter_mut().zip(rows.row(row).iter().zip(&hidden)) {
                let (direct, through_norm) = (a * *w as f64, slope * h);
                sum.0 += coef * (direct + dot * through_norm);
                sum.1 += size * (direct.abs() + dot_size * through_norm.abs());
            }
        };
        for (k, coef) in coef.iter().enumerate().filter(|(_, coef)| **coef != 0.0) {
            let Some(glu_bias) = &self.glu_bias else {
                add(k, *coef, coef.abs());
                continue;
            };
            let ((value, value_size), (gate, gate_size)) = (product(2 * k), product(2 * k + 1));
            let value = a * value + self.bias[k] as f64;
            let gate = a * gate + glu_bias[k] as f64;
            let (sigmoid, rest) = (sigmoid(gate), sigmoid(-gate));
            let [value_size, gate_size] = [value_size, gate_size].map(|x| less_exact * a * x);
            add(2 * k, coef * sigmoid, coef.abs() * sigmoid * (1.0 + rest * gate_size));
            let size = value.abs() * (1.0 + gate_size) + value_size;
            add(2 * k + 1, coef * value * sigmoid * rest, coef.abs() * sigmoid * rest * size);
        }
        sum
    }

    fn mask(&self, t: usize) -> f32 {
        self.mask.as_ref().map_or(1.0, |mask| mask[t])
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl Dictionary {
    fn random(
        random: &mut Random,
        count: usize,
        d_in: usize,
        norm: TokenNorm,
        glu: bool,
    ) -> Dictionary {
        let groups = random.pick(&[1, 1, 2, 3]);
        let size = count.div_ceil(groups) + random.pick(&[0, 1, 70, 600]);
        let rivals = groups * size;
        let group_of = |k: usize| (k % groups) as u32;
        let gate = TopK {
            k: 1 + random.below(size.min(90)),
            group: (0..count).map(group_of).collect(),
            group_ends: (1..=groups).map(|g| g * size).collect(),
            by_magnitude: random.below(2) == 0,
            gain: None,
        };
        let has_gain = random.below(3) == 0;
        let rows = EncoderRows {
            d_in,
            weight: random.rows(rivals, d_in, d_in, norm),
            bias: random.normals(rivals).iter().map(|b| 0.1 * b).collect(),
            glu: glu.then(|| GluRows {
                weight: random.rows(rivals, d_in, d_in, norm),
                bias: random.normals(rivals),
            }),
            rank_gain: has_gain.then(|| random.normals(rivals).iter().map(|x| x.abs()).collect()),
            ..EncoderRows::default()
        };
        let mut dictionary = Dictionary { rows, gate };
        let of = |gain: &Vec<f32>| (0..count).map(|k| gain[dictionary.rival(k)]).collect();
        dictionary.gate.gain = dictionary.rows.rank_gain.as_ref().map(of);
        dictionary
    }

    /// Where latent k is among the rivals: the last but so many of its group.
    fn rival(&self, k: usize) -> usize {
        let group = self.gate.group[k] as usize;
        let before = self.gate.group[..k].iter().filter(|g| **g as usize == group).count();
        self.gate.group_ends[group] - 1 - before
    }

    fn place_blocked(
        &self,
        weight: &mut [f32],
        stride: usize,
        bias: &mut [f32],
        glu_bias: &mut Option<Vec<f32>>,
    ) {
        let d_in = self.rows.d_in;
        let width = if self.rows.glu.is_some() { 2 } else { 1 };
        for (k, bias) in bias.iter_mut().enumerate() {
            let rival = self.rival(k);
            let mut place = |row: usize, from: &[f32]| {
                weight[row * stride..][..d_in].copy_from_slice(&from[rival * d_in..][..d_in]);
            };
            place(k * width, &self.rows.weight);
            *bias = self.rows.bias[rival];
            if let (Some(glu), Some(glu_bias)) = (&self.rows.glu, glu_bias.as_mut()) {
                place(2 * k + 1, &glu.weight);
                glu_bias[k] = glu.bias[rival];
            }
        }
    }

    /// The same with some of the blocked latents.
    fn with_blocked(&self, chosen: &[usize]) -> Dictionary {
        let mut dictionary = self.clone();
        dictionary.gate.group = chosen.iter().map(|k| self.gate.group[*k]).collect();
        let pick = |gain: &Vec<f32>| chosen.iter().map(|k| gain[*k]).collect();
        dictionary.gate.gain = self.gate.gain.as_ref().map(pick);
        dictionary
    }

    /// Of each group, from the largest on.
    fn ranks(&self, product: impl Fn(&[f32]) -> f64) -> Vec<Vec<f64>> {
        let EncoderRows { d_in, weight, bias, glu, rank_gain, .. } = &self.rows;
        let of_rival = |rival: usize| {
            let sum = |weight: &[f32], bias: &[f32]| {
                product(&weight[rival * d_in..][..*d_in]) + bias[rival] as f64
            };
            let mut pre = sum(weight, bias);
            if let Some(glu) = glu {
                pre *= sigmoid(sum(&glu.weight, &glu.bias));
            }
            self.gate.rank(rank_gain.as_ref().map_or(1.0, |gain| gain[rival]) as f64 * pre)
        };
        let of_group = |group| {
            let mut ranks: Vec<f64> = self.gate.rivals_of(group).map(of_rival).collect();
            ranks.sort_by(|a, b| b.total_cmp(a));
            ranks
        };
        (0..self.gate.groups()).map(of_group).collect()
    }

    /// From the rank that is nearest on the other side of the k-th place; with relu also from 0.
    fn distance(&self, k: usize, pre: f64, ranks: &[Vec<f64>]) -> f64 {
        let ranks = &ranks[self.gate.group[k] as usize];
        let next = ranks.get(self.gate.k).copied().unwrap_or(f64::NEG_INFINITY);
        let own = self.gate.rank(self.gate.gain(k) as f64 * pre);
        let place = if own > next { own - next } else { own - ranks[self.gate.k - 1] };
        if self.gate.by_magnitude { place } else { place.min(pre) }
    }
}

/// Outputs of one way to compute a problem.
struct Outputs {
    latents: Memory,
    coef: Memory,
    loss: f64,
    count: f64,
    latent_loss: Vec<f64>,
    grad: Memory,
}

impl Outputs {
    fn new(p: &Problem) -> Outputs {
        Outputs {
            latents: Memory::new(DType::F32, p.tokens, p.count, 3, 1),
            coef: Memory::new(DType::F32, p.tokens, p.count, 2, 1),
            loss: f64::NAN,
            count: f64::NAN,
            latent_loss: vec![f64::NAN; p.count],
            grad: p.grad.clone(),
        }
    }

    fn call(&mut self, p: &Problem, grad: bool, workspace: Workspace) -> PenaltyCall {
        let output = |x: *mut f64| Some(Output { data: x.cast(), dtype: DType::F64, stride: 1 });
        PenaltyCall {
            tokens: p.tokens,
            hidden: p.hidden.matrix(),
            reference: p.reference.matrix(),
            mask: p.mask.as_ref().map(|mask| Mask {
                data: mask.as_ptr().cast(),
                dtype: DType::F32,
                stride: 1,
            }),
            coef: Some(self.coef.matrix()),
            loss_sum: output(&mut self.loss),
            token_count: output(&mut self.count),
            latent_loss: output(self.latent_loss.as_mut_ptr()),
            grad: grad.then(|| self.grad(p)),
            workspace,
        }
    }

    fn grad(&self, p: &Problem) -> Grad {
        Grad {
            rows: self.grad.matrix(),
            accumulate: p.accumulate,
            scale: 2.0 * p.factor as f64,
            scale_tensor: Some(&0.5),
        }
    }

    fn assert_same(&self, other: &Outputs, what: &str, p: &Problem) {
        let name = &p.name;
        assert_eq!(self.latents.bits(), other.latents.bits(), "latents, {what}: {name}");
        assert_eq!(self.coef.bits(), other.coef.bits(), "coef, {what}: {name}");
        assert_eq!(self.grad.bits(), other.grad.bits(), "grad, {what}: {name}");
        let sums = |o: &Outputs| -> Vec<u64> {
            [&[o.loss, o.count], &o.latent_loss[..]].concat().iter().map(|x| x.to_bits()).collect()
        };
        assert_eq!(sums(self), sums(other), "sums, {what}: {name}");
    }
}

fn space(bytes: usize) -> Vec<Line> {
    vec![Line([f32::NAN; 16]); bytes.div_ceil(64)]
}

fn workspace(lines: &mut [Line]) -> Workspace {
    Workspace { data: lines.as_mut_ptr().cast(), size: size_of_val(lines) }
}

/// Encode and the fused penalty on one instruction set.
fn fused(p: &Problem, isa: Isa, threads: usize) -> Outputs {
    let cpu = p.cpu(threads, isa);
    let mut out = Outputs::new(p);
    let mut lines = space(cpu.workspace_size(p.tokens));
    let call = out.call(p, true, workspace(&mut lines));
    // SAFETY: every matrix has the problem's shape.
    unsafe {
        cpu.penalty(&call, Stream::NULL).unwrap();
        let (hidden, latents) = (p.hidden.matrix(), out.latents.matrix());
        let workspace = workspace(&mut lines);
        let call = EncodeCall { tokens: p.tokens, hidden, latents, workspace };
        cpu.encode(&call, Stream::NULL).unwrap();
    }
    out
}

/// Forward, then backward from the coefficients that it saved.
fn in_two_calls(p: &Problem, isa: Isa) -> Outputs {
    let cpu = p.cpu(1, isa);
    let mut out = Outputs::new(p);
    let mut lines = space(cpu.workspace_size(p.tokens));
    let call = out.call(p, false, workspace(&mut lines));
    // SAFETY: every matrix has the problem's shape.
    unsafe {
        cpu.penalty(&call, Stream::NULL).unwrap();
        let grad = out.grad(p);
        let call = BackwardCall {
            tokens: p.tokens,
            coef: out.coef.matrix(),
            grad,
            hidden: Some(p.hidden.matrix()),
            workspace: call.workspace,
        };
        cpu.backward(&call, Stream::NULL).unwrap();
        let (hidden, latents) = (p.hidden.matrix(), out.latents.matrix());
        let workspace = workspace(&mut lines);
        let call = EncodeCall { tokens: p.tokens, hidden, latents, workspace };
        cpu.encode(&call, Stream::NULL).unwrap();
    }
    out
}

/// The handle-free call; it has no encode, so latents come from a plan.
fn raw(p: &Problem, isa: Isa, threads: usize) -> Outputs {
    let mut out = Outputs::new(p);
    let lines = Cpu::raw_workspace_size(p.count, p.d_in, p.tokens, threads);
    // The bf16 panels of an instruction set that is not this machine's.
    let mut lines = space(lines + super::bf16_lines(p.count, p.d_in) * 64);
    let call = out.call(p, true, workspace(&mut lines));
    // SAFETY: every matrix has the problem's shape.
    unsafe { raw_penalty(isa, &p.rows(), &call, threads) };
    out.latents = fused(p, isa, 1).latents;
    out
}

/// Tokens before and after `at` in calls of their own; the sums are those of the whole.
fn in_two_batches(p: &Problem, isa: Isa, at: usize, whole: &Outputs) -> Outputs {
    let cpu = p.cpu(1, isa);
    let mut out = Outputs::new(p);
    let mut lines = space(cpu.workspace_size(p.tokens));
    let all = out.call(p, true, workspace(&mut lines));
    for (start, tokens) in [(0, at), (at, p.tokens - at)] {
        let call = PenaltyCall {
            tokens,
            hidden: p.hidden.tail(start),
            reference: p.reference.tail(start),
            mask: all.mask.map(|m| Mask { data: m.data.wrapping_add(4 * start), ..m }),
            coef: Some(out.coef.tail(start)),
            grad: Some(Grad { rows: out.grad.tail(start), ..out.grad(p) }),
            ..all
        };
        let (hidden, latents) = (p.hidden.tail(start), out.latents.tail(start));
        // SAFETY: the tails have this many tokens.
        unsafe {
            cpu.penalty(&call, Stream::NULL).unwrap();
            let call = EncodeCall { tokens, hidden, latents, workspace: all.workspace };
            cpu.encode(&call, Stream::NULL).unwrap();
        }
    }
    (out.loss, out.count) = (whole.loss, whole.count);
    out.latent_loss.clone_from(&whole.latent_loss);
    out
}

/// Compares each stage with f64 arithmetic on the output of the stage before.
fn check(p: &Problem, out: &Outputs, tolerance: f64) {
    let close = |x: f64, y: f64, size: f64| (x - y).abs() <= tolerance * size.max(1e-3);
    let mut latent_loss = vec![0.0; p.count];
    let mut count = 0.0;
    for t in 0..p.tokens {
        let mask = p.mask(t) as f64;
        count += mask;
        let exact = p.pre(t);
        for (k, (pre, distance)) in exact.iter().copied().enumerate() {
            let z = out.latents.get(t, k) as f64;
            let scale = p.scale.as_ref().map_or(1.0, |s| s[k] as f64);
            if distance.abs() <= 4.0 * tolerance * scale.max(1.0) {
                continue;
            }
            let on = distance > 0.0;
            let expected = if on { pre } else { 0.0 };
            assert!(
                close(z, expected, 4.0 * scale.max(1.0)),
                "z[{t},{k}] {z} {expected}: {}",
                p.name
            );
        }
        for (k, (_, distance)) in exact.into_iter().enumerate() {
            let z = out.latents.get(t, k) as f64;
            let sw = p.sign_weight[k] as f64;
            let r = (sw.signum() * (z - p.reference.get(t, k) as f64)).max(0.0);
            let scale = p.scale.as_ref().map_or(1.0, |s| s[k] as f64);
            let coef = out.coef.get(t, k) as f64;
            if distance.abs() > 4.0 * tolerance * scale.max(1.0) {
                let expected = if distance > 0.0 { mask * 2.0 * sw * r * scale } else { 0.0 };
                assert!(close(coef, expected, 4.0), "coef[{t},{k}] {coef} {expected}: {}", p.name);
            }
            latent_loss[k] += mask * sw.abs() * r * r;
        }
        let coef: Vec<f64> = out.coef.row(t).iter().map(|c| p.factor as f64 * *c as f64).collect();
        let active = coef.iter().any(|c| *c != 0.0);
        let sum = p.gradient(t, &coef, tolerance / 1e-5);
        for (i, (sum, size)) in sum.into_iter().enumerate() {
            let old = if p.accumulate { p.grad.get(t, i) as f64 } else { 0.0 };
            let new = out.grad.get(t, i) as f64;
            let unit = match out.grad.dtype {
                DType::BF16 => 1.0 / 250.0,
                DType::F16 => 1.0 / 2000.0,
                _ => 0.0,
            };
            let expected = old + sum;
            let slack = 1e-5 * (size + old.abs()) + unit * expected.abs() + 1e-7;
            assert!((new - expected).abs() <= slack, "dH[{t},{i}] {new} {expected}: {}", p.name);
            assert!(active || new == old, "a row without violation changed: {}", p.name);
        }
    }
    let loss: f64 = latent_loss.iter().sum();
    assert!(close(out.loss, loss, 10.0 * loss), "loss {} {loss}: {}", out.loss, p.name);
    assert!(close(out.count, count, count), "count {} {count}: {}", out.count, p.name);
    for (k, (x, y)) in out.latent_loss.iter().zip(&latent_loss).enumerate() {
        assert!(close(*x, *y, 10.0 * y), "latent_loss[{k}] {x} {y}: {}", p.name);
    }
}

const TOKENS: [usize; 6] = [0, 1, 2, 31, 33, 257];
const COUNTS: [usize; 7] = [1, 5, 6, 7, 20, 64, 129];
const WIDTHS: [usize; 7] = [1, 15, 16, 17, 63, 768, 1025];

/// Each size at least twice, with everything else at random.
fn problems() -> impl Iterator<Item = Problem> {
    let mut random = Random::fresh();
    (0..42).map(move |i| {
        let tokens = TOKENS[i % 6];
        Problem::random(&mut random, tokens, COUNTS[i % 7], WIDTHS[(i / 6 + i) % 7])
    })
}

#[test]
fn every_instruction_set_gives_the_bits_of_the_portable_one_and_they_are_right() {
    for p in problems() {
        let first = fused(&p, Isa::Portable, 1);
        check(&p, &first, 3e-5);
        for isa in Isa::available().into_iter().filter(|isa| !isa.has_bf16_dot()) {
            fused(&p, isa, 1).assert_same(&first, isa.name(), &p);
        }
    }
}

#[test]
fn bf16_dot_products_are_right_and_depend_on_their_own_rows_only() {
    for p in problems() {
        let first = fused(&p, Isa::PortableBf16, 1);
        // Each weight keeps 16 bits: an error of 2^-17 of every product at most.
        check(&p, &first, 1e-4);
        in_two_calls(&p, Isa::PortableBf16).assert_same(&first, "two calls", &p);
        if p.is_raw() {
            raw(&p, Isa::PortableBf16, 1).assert_same(&first, "raw", &p);
        }
        in_two_batches(&p, Isa::PortableBf16, p.tokens / 3, &first)
            .assert_same(&first, "batches", &p);
        for isa in Isa::available().into_iter().filter(|isa| isa.has_bf16_dot()) {
            fused(&p, isa, 1).assert_same(&first, isa.name(), &p);
        }
    }
}

#[test]
fn calls_batches_and_handles_change_no_bit() {
    for p in problems() {
        let first = fused(&p, Isa::detect(), 1);
        in_two_calls(&p, Isa::detect()).assert_same(&first, "two calls", &p);
        if p.is_raw() {
            raw(&p, Isa::detect(), 1).assert_same(&first, "raw", &p);
        }
        for at in [p.tokens / 3, p.tokens.min(1)] {
            in_two_batches(&p, Isa::detect(), at, &first).assert_same(&first, "two batches", &p);
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let mut random = Random::fresh();
    for (tokens, count, d_in) in [(257, 129, 1025), (1000, 20, 1024)] {
        let p = Problem::random(&mut random, tokens, count, d_in);
        let first = fused(&p, Isa::detect(), 1);
        for threads in [2, 3, 8] {
            fused(&p, Isa::detect(), threads).assert_same(&first, "threads", &p);
            if p.is_raw() {
                raw(&p, Isa::detect(), threads).assert_same(&first, "raw threads", &p);
            }
        }
    }
}

/// A latent's rows, without what lies between them.
fn rows_of(p: &Problem, k: usize) -> Vec<f32> {
    let rows = p.rows();
    (k * rows.width()..(k + 1) * rows.width()).flat_map(|row| rows.row(row).to_vec()).collect()
}

#[test]
fn a_latent_does_not_depend_on_the_others() {
    for p in problems().filter(|p| p.count > 1) {
        let whole = fused(&p, Isa::detect(), 1).latents;
        let mut random = Random::fresh();
        let chosen: Vec<usize> = (1..p.count).rev().filter(|_| random.below(3) == 0).collect();
        let chosen = [chosen, vec![0]].concat();
        let pick = |values: &[f32]| chosen.iter().map(|k| values[*k]).collect::<Vec<f32>>();
        let subset = Problem {
            count: chosen.len(),
            weight: chosen.iter().flat_map(|k| rows_of(&p, *k)).collect(),
            weight_stride: p.d_in,
            bias: pick(&p.bias),
            scale: p.scale.as_deref().map(pick),
            glu_bias: p.glu_bias.as_deref().map(pick),
            gate_values: pick(&p.gate_values),
            dictionary: p.dictionary.with_blocked(&chosen),
            sign_weight: pick(&p.sign_weight),
            reference: Memory::new(DType::F32, p.tokens, chosen.len(), 0, 0),
            ..p.clone()
        };
        let part = fused(&subset, Isa::detect(), 1).latents;
        for t in 0..p.tokens {
            for (i, k) in chosen.iter().enumerate() {
                let (x, y) = (part.get(t, i), whole.get(t, *k));
                assert_eq!(x.to_bits(), y.to_bits(), "z[{t},{k}]: {} {chosen:?}", p.name);
            }
        }
    }
}

#[test]
fn equal_hidden_states_cost_nothing_and_touch_nothing() {
    for mut p in problems() {
        p.reference = fused(&p, Isa::detect(), 1).latents;
        p.accumulate = true;
        p.grad = Memory::new(p.grad.dtype, p.tokens, p.d_in, 5, 1);
        let out = fused(&p, Isa::detect(), 2);
        assert_eq!(out.loss, 0.0, "{}", p.name);
        assert_eq!(out.grad.bits(), p.grad.bits(), "{}", p.name);
    }
}

#[test]
fn nan_of_a_masked_token_is_not_seen_and_of_any_other_reaches_everything() {
    let mut random = Random::fresh();
    for mask in [0.0, 1.0] {
        let mut p = Problem::random(&mut random, 33, 20, 63);
        let mut weights = vec![1.0; p.tokens];
        weights[7] = mask;
        p.mask = Some(weights);
        (0..p.d_in).for_each(|i| p.hidden.set(7, i, f32::NAN));
        let out = fused(&p, Isa::detect(), 1);
        let (coef, grad) = (out.coef.row(7), out.grad.row(7));
        if mask == 0.0 {
            assert!(out.loss.is_finite(), "{}", p.name);
            assert!(coef.iter().all(|c| c.to_bits() == 0), "{}", p.name);
            let old = if p.accumulate { p.grad.row(7) } else { vec![0.0; p.d_in] };
            assert_eq!(grad, old, "{}", p.name);
        } else {
            assert!(out.loss.is_nan(), "{}", p.name);
            assert!(coef.iter().chain(&grad).all(|x| x.is_nan()), "{}", p.name);
        }
    }
}

#[test]
fn a_nan_mask_reaches_the_sums() {
    let mut p = Problem::random(&mut Random::fresh(), 3, 5, 17);
    p.mask = Some(vec![1.0, f32::NAN, 0.0]);
    let out = fused(&p, Isa::detect(), 1);
    assert!(out.loss.is_nan() && out.count.is_nan(), "{}", p.name);
}

#[test]
fn large_aligned_gradients_are_streamed_and_the_same() {
    let mut p = Problem::random(&mut Random::fresh(), 4100, 3, 1024);
    p.accumulate = false;
    p.grad = Memory::new(p.grad.dtype, p.tokens, p.d_in, 1024, 0);
    let streamed = fused(&p, Isa::detect(), 2);
    p.grad = Memory::new(p.grad.dtype, p.tokens, p.d_in, 1024, 1);
    let stored = fused(&p, Isa::detect(), 2);
    for t in 0..p.tokens {
        let bits =
            |x: &Outputs| -> Vec<u32> { x.grad.row(t).iter().map(|x| x.to_bits()).collect() };
        assert_eq!(bits(&streamed), bits(&stored), "{}", p.name);
    }
}

/// A host that flushes denormals on the calling thread gets the same bits, and its mode back.
#[cfg(target_arch = "x86_64")]
#[test]
fn the_hosts_float_mode_changes_no_bit() {
    let mut p = Problem::random(&mut Random::fresh(), 2, 5, 17);
    p.weight.iter_mut().for_each(|w| *w *= 1e-38);
    p.bias.fill(0.0);
    p.gate = GateKind::Open;
    let first = fused(&p, Isa::detect(), 1);
    let mode = |set: u32| {
        let mut old = 0u32;
        // SAFETY: reads and writes MXCSR only.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &mut old, options(nostack));
            std::arch::asm!("ldmxcsr [{}]", in(reg) &set, options(nostack));
        }
        old
    };
    const FLUSH: u32 = 0x9fc0;
    mode(FLUSH);
    let second = fused(&p, Isa::detect(), 1);
    let after = mode(0x1f80);
    assert_eq!(after & 0x8040, FLUSH & 0x8040, "the host's mode is gone");
    second.assert_same(&first, "flushed denormals", &p);
}

/// The pool's threads are not in the child: it must do the work itself, to the same bits.
#[cfg(unix)]
#[test]
fn a_forked_child_computes_without_the_pool() {
    let p = Problem::random(&mut Random::fresh(), 257, 64, 768);
    let cpu = p.cpu(2, Isa::detect());
    let (mut parent, mut child) = (Outputs::new(&p), Outputs::new(&p));
    let mut lines = space(cpu.workspace_size(p.tokens));
    let call = parent.call(&p, true, workspace(&mut lines));
    // SAFETY: every matrix has the problem's shape.
    unsafe { cpu.penalty(&call, Stream::NULL).unwrap() };
    let call = child.call(&p, true, workspace(&mut lines));
    // SAFETY: the child calls nothing but the backend, and leaves without running destructors.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::alarm(60);
            cpu.penalty(&call, Stream::NULL).unwrap();
            libc::_exit((child.loss.to_bits() != parent.loss.to_bits()) as i32);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        assert!(libc::WIFEXITED(status), "the child hung or crashed: {}", p.name);
        assert_eq!(libc::WEXITSTATUS(status), 0, "another loss in the child: {}", p.name);
    }
}
