//! Statistics of whole dictionaries: against sums of a plan's own latents bit for bit, against the
//! f64 reference, and the promises about cuts, threads, masks and NaN.

mod support;

use blockem::error::Status;
use blockem::latents::Latents;
use blockem::penalty::{EncodeArgs, PenaltyArgs, Scratch, WORKSPACE_ALIGN};
use blockem::plan::{Activation, BackendKind, Part, Plan, PlanOptions};
use blockem::sae::{Architecture, Sae, SaeOptions, Selection, TokenNorm};
use blockem::stats::{Stats, StatsArgs, rows};
use blockem::tensor::{DType, Device, Element, Tensor, TensorMut};
use half::{bf16, f16};
use support::{Encoder, RandomSae, Rng, Rule};

/// Every gate, selection, norm and encoder.
const RULES: [Rule; 17] = {
    use Activation::{DenseRelu, Native, Preactivation};
    use Architecture::{Gated, JumpRelu, Standard, TopK};
    use Encoder::{Glu, Plain};
    use Selection::{Groups, Largest, Magnitude};
    use TokenNorm::{Constant, Layer, None};
    [
        Rule(Plain, Standard, Largest, None, Native),
        Rule(Plain, JumpRelu, Largest, None, Native),
        Rule(Plain, Gated, Largest, None, Native),
        Rule(Plain, Gated, Largest, Layer, DenseRelu),
        Rule(Plain, JumpRelu, Largest, Constant, Preactivation),
        Rule(Plain, TopK, Largest, None, Native),
        Rule(Plain, TopK, Magnitude, None, Native),
        Rule(Plain, TopK, Groups, None, Native),
        Rule(Plain, TopK, Largest, Layer, Native),
        Rule(Plain, TopK, Groups, Constant, Native),
        Rule(Plain, TopK, Largest, None, DenseRelu),
        Rule(Glu, Standard, Largest, None, Native),
        Rule(Glu, JumpRelu, Largest, Layer, Native),
        Rule(Glu, JumpRelu, Largest, Constant, Preactivation),
        Rule(Glu, TopK, Largest, None, Native),
        Rule(Glu, TopK, Groups, Layer, Native),
        Rule(Glu, TopK, Magnitude, None, DenseRelu),
    ]
};

/// Tokens, latents, inputs: odd ones, more than a tile of tokens, more than one task and one read.
const SHAPES: [[usize; 3]; 5] =
    [[0, 6, 5], [1, 2, 3], [97, 260, 33], [200, 514, 64], [7, 2300, 18]];

struct Dictionary {
    stats: Stats,
    /// Of all latents.
    plan: Plan,
}

impl Dictionary {
    fn new(sae: &Sae, backend: BackendKind, activation: Activation, num_threads: usize) -> Self {
        let options = PlanOptions { backend, activation, num_threads, ..PlanOptions::default() };
        let ids: Vec<i64> = (0..sae.recipe().d_sae as i64).collect();
        let set = Latents::new(&ids, &vec![1; ids.len()], None).unwrap();
        let (stats, plan) = (Stats::new(sae, &options), Plan::new(sae, &set, &options));
        Dictionary { stats: stats.unwrap(), plan: plan.unwrap() }
    }

    fn z<T: Element, Z: Element + Default>(&self, hidden: &[T]) -> Vec<Z> {
        let tokens = hidden.len() / self.plan.d_in();
        let mut z = vec![Z::default(); tokens * self.plan.num_latents()];
        let mut space = space(self.plan.workspace_size(tokens));
        let args = &mut EncodeArgs {
            hidden: Tensor::from_slice(hidden, &[tokens, self.plan.d_in()]).unwrap(),
            latents: TensorMut::from_slice(&mut z, &[tokens, self.plan.num_latents()]).unwrap(),
            workspace: aligned(&mut space).into(),
        };
        self.plan.encode(args).unwrap();
        z
    }
}

fn space(bytes: usize) -> Vec<u8> {
    vec![0xa5; bytes + WORKSPACE_ALIGN]
}

fn aligned(space: &mut [u8]) -> &mut [u8] {
    let skip = space.as_ptr().align_offset(WORKSPACE_ALIGN);
    &mut space[skip..]
}

/// What statistics write.
#[derive(Clone, Debug, PartialEq)]
struct State {
    rows: Vec<Vec<f64>>,
    token_count: f64,
}

impl State {
    fn poisoned(stats: &Stats, has_base: bool) -> State {
        let height = if has_base { rows::WITH_BASE } else { rows::ALONE };
        State { rows: vec![vec![f64::NAN; stats.d_sae()]; height], token_count: f64::NAN }
    }

    /// Begins at nothing.
    fn of<T: Element>(
        stats: &Stats,
        hidden: &[T],
        base: Option<&[T]>,
        mask: Option<Tensor<'_>>,
    ) -> State {
        let mut state = State::poisoned(stats, base.is_some());
        state.update(stats, hidden, base, mask, false);
        state
    }

    fn update<T: Element>(
        &mut self,
        stats: &Stats,
        hidden: &[T],
        base: Option<&[T]>,
        mask: Option<Tensor<'_>>,
        accumulate: bool,
    ) {
        const GAP: usize = 3;
        let (tokens, f) = (hidden.len() / stats.d_in(), stats.d_sae());
        let shape = [tokens, stats.d_in()];
        let gap = [f64::from_bits(0x7ff8_dead_beef_0000); GAP];
        let mut flat: Vec<f64> =
            self.rows.iter().flat_map(|row| [row, &gap[..]].concat()).collect();
        let mut count = [self.token_count];
        let mut space = space(stats.workspace_size(tokens, base.is_some()));
        // SAFETY: the rows lie in `flat`, F + GAP apart, and nothing else touches it meanwhile.
        let state = unsafe {
            let data = flat.as_mut_ptr().cast();
            let shape = [self.rows.len(), f];
            TensorMut::from_raw(data, DType::F64, Device::Cpu, &shape, &[f + GAP, 1]).unwrap()
        };
        let args = &mut StatsArgs {
            hidden: Tensor::from_slice(hidden, &shape).unwrap(),
            base_hidden: base.map(|base| Tensor::from_slice(base, &shape).unwrap()),
            mask,
            state,
            token_count: Some(TensorMut::from_slice(&mut count, &[1]).unwrap()),
            accumulate,
            workspace: aligned(&mut space).into(),
        };
        stats.update(args).unwrap();
        for (row, found) in self.rows.iter_mut().zip(flat.chunks(f + GAP)) {
            row.copy_from_slice(&found[..f]);
            let rest = found[f..].iter().map(|x| x.to_bits());
            assert!(rest.eq(gap.map(f64::to_bits)), "between the rows nothing is written");
        }
        self.token_count = count[0];
    }

    fn bits(&self) -> Vec<u64> {
        let all = self.rows.iter().flatten().chain([&self.token_count]);
        all.map(|x| x.to_bits()).collect()
    }
}

/// The formulas of src/stats.rs on z [T, F] of either model, token by token.
fn oracle(f: usize, z: &[f32], base: Option<&[f32]>, share: impl Fn(usize) -> f32) -> State {
    let height = if base.is_some() { rows::WITH_BASE } else { rows::ALONE };
    let mut state = State { rows: vec![vec![0.0; f]; height], token_count: 0.0 };
    for first in (0..height).step_by(rows::BASE_SUM).take(2) {
        state.rows[first + rows::MAX].fill(f64::NEG_INFINITY);
    }
    for t in (0..z.len() / f).filter(|t| share(*t) != 0.0) {
        let m = share(t) as f64;
        state.token_count += m;
        for (first, z) in [(0, Some(z)), (rows::BASE_SUM, base)] {
            let Some(z) = z else { continue };
            for (k, z) in z[t * f..][..f].iter().enumerate() {
                let wide = *z as f64;
                state.rows[first + rows::SUM][k] += m * wide;
                state.rows[first + rows::SQUARE_SUM][k] += m * (wide * wide);
                state.rows[first + rows::ACTIVE][k] += if *z == 0.0 { 0.0 } else { m };
                let max = &mut state.rows[first + rows::MAX][k];
                *max = if wide > *max || wide.is_nan() { wide } else { *max };
            }
        }
        let Some(base) = base else { continue };
        for k in 0..f {
            let rise = z[t * f + k] - base[t * f + k];
            let square = (rise as f64) * (rise as f64);
            let row = if rise > 0.0 { rows::RISE_SQUARE_SUM } else { rows::FALL_SQUARE_SUM };
            state.rows[row][k] += m * square;
        }
    }
    state
}

fn sums_are_those_of_a_plans_latents<T: Element>(rng: &mut Rng, from: fn(f32) -> T) {
    for (i, rule) in RULES.into_iter().enumerate() {
        let [tokens, f, d] = SHAPES[(i + rng.below(5)) % 5];
        let sae = rule.sae(rng, d, f).open();
        let of = Dictionary::new(&sae, BackendKind::Cpu, rule.4, 1 + rng.below(3));
        let what = format!("{rule:?}, T {tokens}");
        assert_eq!(of.stats.identity(), of.plan.identity(), "{what}");
        assert_eq!(of.stats.numerics(), of.plan.numerics(), "{what}");
        let mut hidden = || -> Vec<T> { rng.normals(tokens * d).into_iter().map(from).collect() };
        let (tuned, base) = (hidden(), hidden());
        let (z, z_base): (Vec<f32>, Vec<f32>) = (of.z(&tuned), of.z(&base));
        let shares: Vec<f32> = (0..tokens).map(|_| [0.0, 1.0, 0.3, 2.5][rng.below(4)]).collect();
        let flags: Vec<u8> = shares.iter().map(|m| (*m * 10.0) as u8).collect();
        let view = Tensor::from_slice(&shares, &[tokens]).unwrap();
        let found = State::of(&of.stats, &tuned, Some(&base), Some(view));
        let expected = oracle(f, &z, Some(&z_base), |t| shares[t]);
        assert_eq!(found.bits(), expected.bits(), "two models, {what}");
        let view = Tensor::from_slice(&flags, &[tokens]).unwrap();
        let found = State::of(&of.stats, &tuned, None, Some(view));
        let expected = oracle(f, &z, None, |t| (flags[t] != 0) as u8 as f32);
        assert_eq!(found.bits(), expected.bits(), "one model, {what}");
        let expected = oracle(f, &z, None, |_| 1.0);
        assert_eq!(State::of(&of.stats, &tuned, None, None).bits(), expected.bits(), "{what}");
    }
}

#[test]
fn sums_are_those_of_a_plans_latents_bit_for_bit() {
    let mut rng = Rng::fresh();
    sums_are_those_of_a_plans_latents::<f32>(&mut rng, |x| x);
    sums_are_those_of_a_plans_latents::<f16>(&mut rng, f16::from_f32);
    sums_are_those_of_a_plans_latents::<bf16>(&mut rng, bf16::from_f32);
}

/// The oracle's z in f64, and the CPU near it where no gate has an edge.
#[test]
fn the_reference_is_the_formula_and_the_cpu_agrees() {
    let mut rng = Rng::fresh();
    for rule in RULES {
        let Rule(_, architecture, _, _, activation) = rule;
        let (tokens, f, d) = (19, 24, 9);
        let sae = rule.sae(&mut rng, d, f).open();
        let exact = Dictionary::new(&sae, BackendKind::Reference, activation, 1);
        let wide = |x: Vec<f32>| -> Vec<f64> { x.into_iter().map(f64::from).collect() };
        let (tuned, base) = (rng.normals(tokens * d), rng.normals(tokens * d));
        let shares: Vec<f32> = (0..tokens).map(|_| [0.0, 1.0, 0.5][rng.below(3)]).collect();
        let view = || Some(Tensor::from_slice(&shares, &[tokens]).unwrap());
        let found =
            State::of(&exact.stats, &wide(tuned.clone()), Some(&wide(base.clone())), view());
        let z: Vec<f64> = exact.z(&wide(tuned.clone()));
        let z_base: Vec<f64> = exact.z(&wide(base.clone()));
        for k in 0..f {
            let column = |z: &[f64]| -> Vec<f64> { z.iter().skip(k).step_by(f).copied().collect() };
            let (z, z_base) = (column(&z), column(&z_base));
            let sum = |of: &dyn Fn(usize) -> f64| -> f64 {
                (0..tokens).filter(|t| shares[*t] != 0.0).map(|t| shares[t] as f64 * of(t)).sum()
            };
            let largest = |z: &[f64]| {
                let seen = (0..tokens).filter(|t| shares[*t] != 0.0).map(|t| z[t]);
                seen.fold(f64::NEG_INFINITY, f64::max)
            };
            let expected = [
                sum(&|t| z[t]),
                sum(&|t| z[t] * z[t]),
                sum(&|t| (z[t] != 0.0) as u8 as f64),
                largest(&z),
                sum(&|t| z_base[t]),
                sum(&|t| z_base[t] * z_base[t]),
                sum(&|t| (z_base[t] != 0.0) as u8 as f64),
                largest(&z_base),
                sum(&|t| (z[t] - z_base[t]).max(0.0).powi(2)),
                sum(&|t| (z_base[t] - z[t]).max(0.0).powi(2)),
            ];
            for (row, expected) in expected.into_iter().enumerate() {
                let found = found.rows[row][k];
                let same = found == expected || (found - expected).abs() <= 1e-12 * expected.abs();
                assert!(same, "row {row} of latent {k}: {found} {expected}");
            }
        }
        if activation == Activation::Native && architecture != Architecture::Standard {
            continue;
        }
        let cpu = Dictionary::new(&sae, BackendKind::Cpu, activation, 2);
        let near = State::of(&cpu.stats, &tuned, Some(&base), view());
        for (row, (near, found)) in near.rows.iter().zip(&found.rows).enumerate() {
            for (near, found) in near.iter().zip(found) {
                // A latent near 0 may be on in one of the two.
                let slack = if row % 4 == rows::ACTIVE && row < 8 { 1.0 } else { 1e-4 };
                let same = near == found || (near - found).abs() <= slack * (1.0 + found.abs());
                assert!(same, "row {row}: {near} {found}");
            }
        }
    }
}

#[test]
fn sums_do_not_depend_on_cuts_or_threads() {
    let mut rng = Rng::fresh();
    for rule in RULES {
        let Rule(.., activation) = rule;
        let (tokens, f, d) = (230, 300, 20);
        let sae = rule.sae(&mut rng, d, f).open();
        let (tuned, base) = (rng.normals(tokens * d), rng.normals(tokens * d));
        let shares: Vec<f32> = (0..tokens).map(|_| [0.0, 1.0, 0.37][rng.below(3)]).collect();
        let whole = Dictionary::new(&sae, BackendKind::Cpu, activation, 1);
        let view = Tensor::from_slice(&shares, &[tokens]).unwrap();
        let whole = State::of(&whole.stats, &tuned, Some(&base), Some(view));
        let parts = Dictionary::new(&sae, BackendKind::Cpu, activation, 3);
        let mut state = State::poisoned(&parts.stats, true);
        let mut at = 0;
        while at < tokens {
            let end = tokens.min(at + rng.below(120));
            let view = Tensor::from_slice(&shares[at..end], &[end - at]).unwrap();
            let (tuned, base) = (&tuned[at * d..end * d], &base[at * d..end * d]);
            let accumulate = !state.token_count.is_nan();
            state.update(&parts.stats, tuned, Some(base), Some(view), accumulate);
            at = end;
        }
        assert_eq!(state.bits(), whole.bits(), "{rule:?}");
    }
}

#[test]
fn rise_and_fall_are_the_penalty_of_each_latent() {
    let mut rng = Rng::fresh();
    let (tokens, f, d) = (150, 70, 30);
    let sae = RandomSae::new(&mut rng, Architecture::JumpRelu, d, f).open();
    let of = Dictionary::new(&sae, BackendKind::Cpu, Activation::Native, 2);
    let (tuned, base) = (rng.normals(tokens * d), rng.normals(tokens * d));
    let shares: Vec<f32> = (0..tokens).map(|_| [0.0, 1.0, 0.37][rng.below(3)]).collect();
    let view = || Some(Tensor::from_slice(&shares, &[tokens]).unwrap());
    let state = State::of(&of.stats, &tuned, Some(&base), view());
    let ids: Vec<i64> = (0..f as i64).collect();
    for (sign, row) in [(1, rows::RISE_SQUARE_SUM), (-1, rows::FALL_SQUARE_SUM)] {
        let set = Latents::new(&ids, &vec![sign; f], None).unwrap();
        let plan = Plan::new(&sae, &set, &PlanOptions::default()).unwrap();
        let (mut latent_loss, reference): (_, Vec<f32>) = (vec![f64::NAN; f], of.z(&base));
        let mut space = space(plan.workspace_size(tokens));
        plan.forward(&mut PenaltyArgs {
            hidden: Some(Tensor::from_slice(&tuned, &[tokens, d]).unwrap()),
            reference: Some(Tensor::from_slice(&reference, &[tokens, f]).unwrap()),
            mask: view(),
            latent_loss: Some(TensorMut::from_slice(&mut latent_loss, &[f]).unwrap()),
            workspace: aligned(&mut space).into(),
            ..PenaltyArgs::default()
        })
        .unwrap();
        // The penalty adds up blocks of tokens first.
        for (k, (found, loss)) in state.rows[row].iter().zip(&latent_loss).enumerate() {
            assert!((found - loss).abs() <= 1e-13 * loss.abs(), "latent {k}: {found} {loss}");
        }
        assert!(latent_loss.iter().any(|loss| *loss > 0.0));
    }
}

#[test]
fn nan_reaches_the_sums_unless_masked() {
    let mut rng = Rng::fresh();
    let (tokens, f, d) = (40, 20, 9);
    for rule in RULES {
        for backend in [BackendKind::Cpu, BackendKind::Reference] {
            let sae = rule.sae(&mut rng, d, f).open();
            let of = Dictionary::new(&sae, backend, rule.4, 2);
            let (clean, base) = (rng.normals(tokens * d), rng.normals(tokens * d));
            let mut dirty = clean.clone();
            dirty[7 * d + 3] = f32::NAN;
            let found = State::of(&of.stats, &dirty, Some(&base), None);
            let is_nan = |row: usize| found.rows[row].iter().all(|x| x.is_nan());
            for row in [rows::SUM, rows::SQUARE_SUM, rows::MAX, rows::RISE_SQUARE_SUM] {
                assert!(is_nan(row), "row {row} {backend:?} {rule:?}");
            }
            assert!(!found.rows[rows::BASE_SUM].iter().any(|x| x.is_nan()));
            assert!(!found.rows[rows::ACTIVE].iter().any(|x| x.is_nan()));
            let mask: Vec<bool> = (0..tokens).map(|t| t != 7).collect();
            let view = || Some(Tensor::from_slice(&mask, &[tokens]).unwrap());
            let without = State::of(&of.stats, &dirty, Some(&base), view());
            assert_eq!(without.bits(), State::of(&of.stats, &clean, Some(&base), view()).bits());
            assert_eq!(without.token_count, 39.0);
            let nothing = vec![false; tokens];
            let view = Tensor::from_slice(&nothing, &[tokens]).unwrap();
            let mut state = State::of(&of.stats, &dirty, Some(&base), Some(view));
            assert_eq!(state.token_count, 0.0);
            for (row, values) in state.rows.iter().enumerate() {
                let is_max = row == rows::MAX || row == rows::BASE_MAX;
                let empty = if is_max { f64::NEG_INFINITY } else { 0.0 };
                assert!(values.iter().all(|x| *x == empty), "row {row}");
            }
            // What is there stays when nothing is added.
            state.rows[0].fill(3.25);
            let before = state.clone();
            state.update(&of.stats, &dirty, Some(&base), Some(view), true);
            assert_eq!(state, before);
        }
    }
}

#[test]
fn what_cannot_be_exact_is_refused() {
    let mut rng = Rng::fresh();
    let mut sae = RandomSae::new(&mut rng, Architecture::TopK, 8, 16);
    let folder = tempfile::tempdir().unwrap();
    let part = folder.path().join("part.safetensors");
    sae.open().convert(Some(&[0, 1, 2]), &part, &mut |_, _| {}).unwrap();
    let part = Sae::open(&part, &SaeOptions::default()).unwrap();
    sae.selection = Selection::Batch;
    let refused = |sae: &Sae, activation, word: &str| {
        let options = PlanOptions { activation, ..PlanOptions::default() };
        let error = Stats::new(sae, &options).err().expect(word);
        assert_eq!(error.status, Status::Unsupported, "{error}");
        assert!(error.message.contains(word), "{error}");
    };
    for activation in [Activation::Native, Activation::DenseRelu] {
        refused(&part, activation, "partial");
    }
    refused(&sae.open(), Activation::Native, "batch");
    let options = PlanOptions { part: Part::Gate, ..PlanOptions::default() };
    let error = Stats::new(&sae.open(), &options).err().unwrap();
    assert_eq!(error.status, Status::Unsupported, "{error}");
    let options = PlanOptions { activation: Activation::DenseRelu, ..PlanOptions::default() };
    assert!(Stats::new(&sae.open(), &options).is_ok());
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let mut rng = Rng::fresh();
    let (tokens, f, d) = (5, 12, 4);
    let sae = RandomSae::new(&mut rng, Architecture::TopK, d, f).open();
    let stats = Stats::new(&sae, &PlanOptions::default()).unwrap();
    let hidden = rng.normals(tokens * d);
    let view = |data: &'static [f32], rows, cols| Tensor::from_slice(data, &[rows, cols]).unwrap();
    let hidden: &'static [f32] = hidden.leak();
    let refused = |expected: Status, word: &str, mut args: StatsArgs<'_>| {
        let before = args.state.view().shape().to_vec();
        let error = stats.update(&mut args).unwrap_err();
        assert_eq!(error.status, expected, "{error} {before:?}");
        assert!(error.message.contains(word), "{error}");
    };
    let (mut own, mut sums) =
        (space(stats.workspace_size(tokens, true)), vec![7.0; rows::ALONE * f]);
    let plain = || {
        let (own, sums): (&mut [u8], &mut [f64]) = (own.clone().leak(), sums.clone().leak());
        let state = TensorMut::from_slice(sums, &[rows::ALONE, f]).unwrap();
        let args = StatsArgs::new(view(hidden, tokens, d), state);
        StatsArgs { workspace: aligned(own).into(), ..args }
    };
    assert!(stats.update(&mut plain()).is_ok());
    let base_hidden = Some(view(hidden, tokens, d));
    refused(Status::Shape, "state", StatsArgs { base_hidden, ..plain() });
    let turned = view(hidden, d, tokens);
    refused(Status::Shape, "hidden", StatsArgs { hidden: turned, ..plain() });
    let base_hidden = Some(view(&hidden[d..], tokens - 1, d));
    refused(Status::Shape, "base_hidden", StatsArgs { base_hidden, ..plain() });
    let mask = Some(Tensor::from_slice(&[1u8; 4], &[4]).unwrap());
    refused(Status::Shape, "mask", StatsArgs { mask, ..plain() });
    let workspace = Scratch::NONE;
    refused(Status::WorkspaceTooSmall, "workspace", StatsArgs { workspace, ..plain() });
    let mut long = vec![7.0; rows::WITH_BASE * f];
    let state = TensorMut::from_slice(&mut long, &[rows::WITH_BASE, f]).unwrap();
    refused(Status::Shape, "state", StatsArgs { state, ..plain() });
    let mut narrow = vec![7.0f32; rows::ALONE * f];
    let state = TensorMut::from_slice(&mut narrow, &[rows::ALONE, f]).unwrap();
    refused(Status::Dtype, "state", StatsArgs { state, ..plain() });
    // The count among the sums.
    let count = sums.as_mut_ptr().cast::<u8>();
    // SAFETY: the call refuses both and touches neither.
    let count = unsafe { TensorMut::from_raw(count, DType::F64, Device::Cpu, &[1], &[1]).unwrap() };
    let state = TensorMut::from_slice(&mut sums, &[rows::ALONE, f]).unwrap();
    let workspace = aligned(&mut own).into();
    let args = StatsArgs { workspace, ..StatsArgs::new(view(hidden, tokens, d), state) };
    refused(Status::Overlap, "token_count", StatsArgs { token_count: Some(count), ..args });
    assert!([&sums, &long].into_iter().flatten().all(|x| *x == 7.0), "nothing is written");
    assert!(narrow.iter().all(|x| *x == 7.0), "nothing is written");
}
