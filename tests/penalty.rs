//! The penalty through the public interface: the CPU backend against the f64 reference, the
//! reference against finite differences, and the bitwise promises.

mod support;

use blockem::error::{Result, Status};
use blockem::latents::{Latents, Provenance};
use blockem::penalty::{EncodeArgs, PenaltyArgs, Scratch, WORKSPACE_ALIGN, raw_workspace_size};
use blockem::plan::{Activation, BackendKind, Part, Plan, PlanOptions};
use blockem::sae::{Architecture, Sae, SaeOptions, Selection, TokenNorm};
use blockem::tensor::{DType, Element, Tensor, TensorMut};
use half::{bf16, f16};
use support::{Encoder, RandomSae, Rng, Rule};

/// Every architecture and activation; the selections and norms of TopK and other SAEs; GLU encoders
/// with each of them.
fn rules() -> Vec<Rule> {
    use Activation::{DenseRelu, Native, Preactivation};
    use Architecture::{Gated, JumpRelu, Standard, TopK};
    use Encoder::{Glu, Plain};
    use Selection::{Groups, Largest, Magnitude};
    use TokenNorm::{Constant, Layer, None};
    vec![
        Rule(Plain, Standard, Largest, None, Native),
        Rule(Plain, JumpRelu, Largest, None, Native),
        Rule(Plain, Gated, Largest, None, Native),
        Rule(Plain, JumpRelu, Largest, None, DenseRelu),
        Rule(Plain, Gated, Largest, None, DenseRelu),
        Rule(Plain, TopK, Largest, None, DenseRelu),
        Rule(Plain, Gated, Largest, None, Preactivation),
        Rule(Plain, TopK, Largest, None, Native),
        Rule(Plain, TopK, Magnitude, None, Native),
        Rule(Plain, TopK, Groups, None, Native),
        Rule(Plain, TopK, Largest, Layer, Native),
        Rule(Plain, TopK, Groups, Constant, Native),
        Rule(Plain, Standard, Largest, Layer, Native),
        Rule(Plain, JumpRelu, Largest, Constant, Native),
        Rule(Plain, Gated, Largest, Layer, Native),
        Rule(Glu, Standard, Largest, None, Native),
        Rule(Glu, JumpRelu, Largest, None, Native),
        Rule(Glu, JumpRelu, Largest, None, DenseRelu),
        Rule(Glu, JumpRelu, Largest, None, Preactivation),
        Rule(Glu, TopK, Largest, None, Native),
        Rule(Glu, TopK, Groups, Constant, Native),
        Rule(Glu, JumpRelu, Largest, Constant, Native),
        Rule(Glu, Standard, Largest, Layer, Native),
    ]
}

/// An SAE whose first K latents are blocked; TopK ones have as many more.
fn random_sae(rule: Rule, rng: &mut Rng, d: usize, k: usize) -> RandomSae {
    let Rule(_, architecture, ..) = rule;
    rule.sae(rng, d, if architecture == Architecture::TopK { 2 * k } else { k })
}

fn latents(rng: &mut Rng, k: usize) -> Latents {
    let ids: Vec<i64> = (0..k as i64).collect();
    let signs: Vec<i8> = (0..k).map(|_| if rng.below(2) == 0 { 1 } else { -1 }).collect();
    let weights: Vec<f32> = (0..k).map(|_| 0.5 + rng.unit() as f32).collect();
    Latents::new(&ids, &signs, Some(&weights)).unwrap()
}

fn plan(
    sae: &RandomSae,
    set: &Latents,
    backend: BackendKind,
    activation: Activation,
    num_threads: usize,
) -> Plan {
    let options = PlanOptions { backend, activation, num_threads, ..PlanOptions::default() };
    Plan::new(&sae.open(), set, &options).unwrap()
}

fn part_plan(
    sae: &RandomSae,
    set: &Latents,
    backend: BackendKind,
    activation: Activation,
    part: Part,
) -> Result<Plan> {
    let options =
        PlanOptions { backend, activation, num_threads: 1, part, ..PlanOptions::default() };
    Plan::new(&sae.open(), set, &options)
}

fn workspace(plan: &Plan, tokens: usize) -> Vec<u8> {
    vec![0xa5; plan.workspace_size(tokens) + WORKSPACE_ALIGN]
}

fn aligned(space: &mut [u8]) -> &mut [u8] {
    let skip = space.as_ptr().align_offset(WORKSPACE_ALIGN);
    &mut space[skip..]
}

fn encode<T: Element, Z: Element + Default>(plan: &Plan, hidden: &[T]) -> Vec<Z> {
    let tokens = hidden.len() / plan.d_in();
    let mut z = vec![Z::default(); tokens * plan.num_latents()];
    let mut space = workspace(plan, tokens);
    plan.encode(&mut EncodeArgs {
        hidden: Tensor::from_slice(hidden, &[tokens, plan.d_in()]).unwrap(),
        latents: TensorMut::from_slice(&mut z, &[tokens, plan.num_latents()]).unwrap(),
        workspace: aligned(&mut space).into(),
    })
    .unwrap();
    z
}

/// Everything that a penalty call writes.
#[derive(Debug, PartialEq)]
struct Outcome<G> {
    loss_sum: f64,
    token_count: f64,
    latent_loss: Vec<f64>,
    grad: Vec<G>,
}

fn penalty<T: Element, G: Element>(
    plan: &Plan,
    hidden: &[T],
    reference: &[f32],
    mask: Option<Tensor<'_>>,
    poison: G,
) -> Outcome<G> {
    let (d, k) = (plan.d_in(), plan.num_latents());
    let tokens = hidden.len() / d;
    let (mut loss_sum, mut token_count) = ([f64::NAN], [f64::NAN]);
    let mut latent_loss = vec![f64::NAN; k];
    let mut grad = vec![poison; hidden.len()];
    let mut space = workspace(plan, tokens);
    plan.penalty(&mut PenaltyArgs {
        hidden: Some(Tensor::from_slice(hidden, &[tokens, d]).unwrap()),
        reference: Some(Tensor::from_slice(reference, &[tokens, k]).unwrap()),
        mask,
        loss_sum: Some(TensorMut::from_slice(&mut loss_sum, &[1]).unwrap()),
        token_count: Some(TensorMut::from_slice(&mut token_count, &[1]).unwrap()),
        latent_loss: Some(TensorMut::from_slice(&mut latent_loss, &[k]).unwrap()),
        grad_hidden: Some(TensorMut::from_slice(&mut grad, &[tokens, d]).unwrap()),
        scale: 0.75,
        workspace: aligned(&mut space).into(),
        ..PenaltyArgs::default()
    })
    .unwrap();
    Outcome { loss_sum: loss_sum[0], token_count: token_count[0], latent_loss, grad }
}

fn assert_close(name: &str, found: f64, expected: f64, tolerance: f64) {
    let error = (found - expected).abs();
    assert!(error <= tolerance, "{name}: {found} is not {expected} within {tolerance}");
}

/// How far z may be from the reference's, as a share of |W| |h|: f32 sums, or weights in two bf16
/// terms, which keep 2^-17 of every product (rows of a few latents reach a norm of 3).
fn rounding<T: Element>(plan: &Plan) -> f64 {
    let in_two_terms = plan.numerics().ends_with("bf16dot") && T::DTYPE == DType::BF16;
    if in_two_terms { 3.0 * 2f64.powi(-17) } else { 2e-6 }
}

/// CPU against reference for one hidden dtype. A latent at its gate's edge may fall on either side
/// in f32, so those inputs are drawn away from the edge.
fn parity<T: Element>(rng: &mut Rng, from: fn(f32) -> T, to: fn(T) -> f32) {
    for rule @ Rule(.., norm, activation) in rules() {
        for (tokens, k, d) in [(0, 3, 5), (1, 1, 1), (31, 7, 63), (33, 64, 17), (65, 129, 200)] {
            if norm != TokenNorm::None && d == 1 {
                // One input has no deviation.
                continue;
            }
            let sae = random_sae(rule, rng, d, k);
            let set = latents(rng, k);
            let oracle = plan(&sae, &set, BackendKind::Reference, activation, 1);
            let cpu = plan(&sae, &set, BackendKind::Cpu, activation, 2);
            let eps = rounding::<T>(&cpu);
            let hidden: Vec<T> = rng.normals(tokens * d).into_iter().map(from).collect();
            let exact: Vec<f64> = encode(&oracle, &hidden);
            let found: Vec<f32> = encode(&cpu, &hidden);
            let size = |h: &[T]| match norm {
                TokenNorm::None => h.iter().map(|x| (to(*x) as f64).powi(2)).sum::<f64>().sqrt(),
                TokenNorm::Constant | TokenNorm::Layer => (d as f64).sqrt(),
            };
            let size: Vec<f64> = hidden.chunks(d).map(size).collect();
            let mut reference = rng.normals(tokens * k);
            for (t, size) in size.iter().enumerate() {
                for c in 0..k {
                    let i = t * k + c;
                    let off_edge = (exact[i] == 0.0) != (found[i] == 0.0);
                    if off_edge {
                        // Both sides of the edge are right: keep it out of the sums.
                        reference[i] = if set.signs()[c] > 0 { 1e3 } else { -1e3 };
                        continue;
                    }
                    assert_close("z", found[i] as f64, exact[i], eps * (1.0 + size));
                }
            }
            let mask: Vec<f32> = (0..tokens).map(|_| [0.0, 1.0, 0.5][rng.below(3)]).collect();
            let view = || Some(Tensor::from_slice(&mask, &[tokens]).unwrap());
            let expected = penalty(&oracle, &hidden, &reference, view(), f32::NAN);
            let found = penalty(&cpu, &hidden, &reference, view(), f32::NAN);
            let about = 5.0 * eps * (1.0 + expected.loss_sum);
            assert_close("loss_sum", found.loss_sum, expected.loss_sum, about);
            assert_close("token_count", found.token_count, expected.token_count, 1e-9);
            for (f, e) in found.latent_loss.iter().zip(&expected.latent_loss) {
                assert_close("latent_loss", *f, *e, about);
            }
            let largest = expected.grad.iter().fold(0.0f64, |m, g| m.max(g.abs() as f64));
            for (f, e) in found.grad.iter().zip(&expected.grad) {
                assert_close("grad", *f as f64, *e as f64, 10.0 * eps * (1.0 + largest));
            }
        }
    }
}

#[test]
fn cpu_agrees_with_the_reference() {
    let mut rng = Rng::fresh();
    parity::<f32>(&mut rng, |x| x, |x| x);
    parity::<f16>(&mut rng, f16::from_f32, f16::to_f32);
    parity::<bf16>(&mut rng, bf16::from_f32, bf16::to_f32);
}

#[test]
fn the_gradient_is_that_of_the_loss() {
    let mut rng = Rng::fresh();
    let (tokens, k, d) = (5, 6, 9);
    for rule @ Rule(.., activation) in rules() {
        let sae = random_sae(rule, &mut rng, d, k);
        let set = latents(&mut rng, k);
        let oracle = plan(&sae, &set, BackendKind::Reference, activation, 1);
        let hidden: Vec<f64> = rng.normals(tokens * d).iter().map(|x| *x as f64).collect();
        let reference = rng.normals(tokens * k);
        let loss = |h: &[f64]| penalty(&oracle, h, &reference, None, f64::NAN).loss_sum;
        let exact = penalty(&oracle, &hidden, &reference, None, f64::NAN).grad;
        let step = 1e-6;
        let mut compared = 0;
        for i in 0..hidden.len() {
            let at = |delta: f64| {
                let mut moved = hidden.clone();
                moved[i] += delta;
                loss(&moved)
            };
            let (left, middle, right) = (at(-step), at(0.0), at(step));
            // A gate or rectifier between the two points has no derivative to compare with.
            let (backward, forward) = ((middle - left) / step, (right - middle) / step);
            if (forward - backward).abs() > 1e-3 {
                continue;
            }
            compared += 1;
            assert_close("dH", exact[i], 0.75 * (right - left) / (2.0 * step), 1e-6);
        }
        let len = hidden.len();
        assert!(compared > len / 2, "{compared} of {len} compared: {rule:?}");
        assert!(exact.iter().any(|g| *g != 0.0), "no gradient: {rule:?}");
    }
}

#[test]
fn hidden_equal_to_base_costs_exactly_nothing() {
    let mut rng = Rng::fresh();
    for rule @ Rule(.., activation) in rules() {
        let (tokens, k, d) = (77, 19, 130);
        let sae = random_sae(rule, &mut rng, d, k);
        let set = latents(&mut rng, k);
        let cpu = plan(&sae, &set, BackendKind::Cpu, activation, 2);
        let hidden: Vec<bf16> = rng.normals(tokens * d).into_iter().map(bf16::from_f32).collect();
        let reference: Vec<f32> = encode(&cpu, &hidden);
        let found = penalty(&cpu, &hidden, &reference, None, f32::NAN);
        assert_eq!(found.loss_sum, 0.0);
        assert!(found.grad.iter().all(|g| g.to_bits() == 0));
    }
}

#[test]
fn split_and_fused_give_the_same_bits() {
    let mut rng = Rng::fresh();
    let (tokens, k, d) = (150, 21, 300);
    for rule @ Rule(.., activation) in rules() {
        let sae = random_sae(rule, &mut rng, d, k);
        let set = latents(&mut rng, k);
        let cpu = plan(&sae, &set, BackendKind::Cpu, activation, 1 + rng.below(2));
        let hidden = rng.normals(tokens * d);
        let reference = rng.normals(tokens * k);
        let fused = penalty(&cpu, &hidden, &reference, None, f32::NAN);
        let (mut coef, mut grad) = (vec![f32::NAN; tokens * k], vec![f32::NAN; tokens * d]);
        let mut loss_sum = [f64::NAN];
        let mut space = workspace(&cpu, tokens);
        let hidden = || Some(Tensor::from_slice(&hidden, &[tokens, d]).unwrap());
        cpu.forward(&mut PenaltyArgs {
            hidden: hidden(),
            reference: Some(Tensor::from_slice(&reference, &[tokens, k]).unwrap()),
            coef: Some(TensorMut::from_slice(&mut coef, &[tokens, k]).unwrap()),
            loss_sum: Some(TensorMut::from_slice(&mut loss_sum, &[1]).unwrap()),
            workspace: aligned(&mut space).into(),
            ..PenaltyArgs::default()
        })
        .unwrap();
        // 0.75 in two factors, one of them read when the work runs.
        let factor = [3.0f32];
        let mut backward = |with_hidden: bool| {
            cpu.backward(&mut PenaltyArgs {
                hidden: if with_hidden { hidden() } else { None },
                coef: Some(TensorMut::from_slice(&mut coef, &[tokens, k]).unwrap()),
                grad_hidden: Some(TensorMut::from_slice(&mut grad, &[tokens, d]).unwrap()),
                scale: 0.25,
                scale_tensor: Some(Tensor::from_slice(&factor, &[1]).unwrap()),
                workspace: if with_hidden { aligned(&mut space).into() } else { Scratch::NONE },
                ..PenaltyArgs::default()
            })
        };
        match cpu.backward_needs_hidden() {
            true => {
                assert_eq!(backward(false).unwrap_err().status, Status::NullPointer);
                backward(true).unwrap();
            }
            false => backward(false).unwrap(),
        }
        assert_eq!(loss_sum[0].to_bits(), fused.loss_sum.to_bits(), "{rule:?}");
        let same = grad.iter().zip(&fused.grad).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "dH: {rule:?}");
    }
}

#[test]
fn nan_reaches_the_loss_unless_masked() {
    let mut rng = Rng::fresh();
    let (tokens, k, d) = (40, 5, 33);
    let sae = RandomSae::new(&mut rng, Architecture::Standard, d, k);
    let set = latents(&mut rng, k);
    for backend in [BackendKind::Cpu, BackendKind::Reference] {
        let plan = plan(&sae, &set, backend, Activation::Native, 2);
        let mut hidden = rng.normals(tokens * d);
        let reference = rng.normals(tokens * k);
        hidden[7 * d + 3] = f32::NAN;
        let found = penalty(&plan, &hidden, &reference, None, 0.0f32);
        assert!(found.loss_sum.is_nan());
        assert!(found.grad[7 * d..8 * d].iter().all(|g| g.is_nan()));
        assert!(!found.grad[8 * d..].iter().any(|g| g.is_nan()));
        let mask: Vec<bool> = (0..tokens).map(|t| t != 7).collect();
        let view = Tensor::from_slice(&mask, &[tokens]).unwrap();
        let found = penalty(&plan, &hidden, &reference, Some(view), f32::NAN);
        assert!(found.loss_sum.is_finite());
        assert_eq!(found.token_count, tokens as f64 - 1.0);
        assert!(found.grad[7 * d..8 * d].iter().all(|g| *g == 0.0));
        let nothing = vec![0u8; tokens];
        let view = Tensor::from_slice(&nothing, &[tokens]).unwrap();
        let found = penalty(&plan, &hidden, &reference, Some(view), f32::NAN);
        assert_eq!((found.loss_sum, found.token_count), (0.0, 0.0));
        assert!(found.grad.iter().all(|g| *g == 0.0));
    }
}

#[test]
fn topk_and_glu_plans_need_a_workspace_to_encode() {
    let mut rng = Rng::fresh();
    let topk = RandomSae::new(&mut rng, Architecture::TopK, 8, 16);
    let glu = RandomSae::new(&mut rng, Architecture::Standard, 8, 16).with_glu(&mut rng);
    for sae in [topk, glu] {
        let plan = plan(&sae, &latents(&mut rng, 3), BackendKind::Cpu, Activation::Native, 1);
        assert!(plan.encode_needs_workspace());
        let (hidden, mut z) = (rng.normals(8), [f32::NAN; 3]);
        let error = plan
            .encode(&mut EncodeArgs {
                hidden: Tensor::from_slice(&hidden, &[1, 8]).unwrap(),
                latents: TensorMut::from_slice(&mut z, &[1, 3]).unwrap(),
                workspace: Scratch::NONE,
            })
            .unwrap_err();
        assert_eq!(error.status, Status::WorkspaceTooSmall, "{error}");
        assert!(z.iter().all(|z| z.is_nan()), "nothing is written");
    }
}

/// Without the whole dictionary, or where other tokens decide, there is no native activation.
#[test]
fn native_topk_is_refused_where_it_cannot_be_exact() {
    let mut rng = Rng::fresh();
    let mut sae = RandomSae::new(&mut rng, Architecture::TopK, 8, 16);
    let set = latents(&mut rng, 3);
    let folder = tempfile::tempdir().unwrap();
    let part = folder.path().join("part.safetensors");
    sae.open().convert(Some(&[0, 1, 2]), &part, &mut |_, _| {}).unwrap();
    let part = Sae::open(&part, &SaeOptions::default()).unwrap();
    sae.selection = Selection::Batch;
    for (sae, word) in [(part, "partial"), (sae.open(), "batch")] {
        let error = Plan::new(&sae, &set, &PlanOptions::default()).err().unwrap();
        assert_eq!(error.status, Status::Unsupported, "{error}");
        assert!(error.message.contains("dense_relu") && error.message.contains(word), "{error}");
        let options = PlanOptions { activation: Activation::DenseRelu, ..PlanOptions::default() };
        assert!(Plan::new(&sae, &set, &options).is_ok(), "{word}");
    }
}

#[test]
fn identity_follows_what_z_depends_on() {
    let mut rng = Rng::fresh();
    let mut sae = RandomSae::new(&mut rng, Architecture::JumpRelu, 12, 9);
    let of = |sae: &RandomSae, ids: &[i64], signs: &[i8], activation| {
        let set = Latents::new(ids, signs, None).unwrap();
        plan(sae, &set, BackendKind::Cpu, activation, 1).identity().to_owned()
    };
    let first = of(&sae, &[1, 4], &[1, 1], Activation::Native);
    assert_eq!(first.len(), 64);
    assert_eq!(first, of(&sae, &[1, 4], &[1, -1], Activation::Native), "signs do not change z");
    assert_ne!(first, of(&sae, &[4, 1], &[1, 1], Activation::Native), "columns are exchanged");
    assert_ne!(first, of(&sae, &[1, 4], &[1, 1], Activation::DenseRelu), "another rule");
    sae.threshold[4] += 0.25;
    assert_ne!(first, of(&sae, &[1, 4], &[1, 1], Activation::Native), "another threshold");
    let mut sae = RandomSae::new(&mut rng, Architecture::TopK, 12, 10);
    let first = of(&sae, &[1, 4], &[1, 1], Activation::Native);
    let dense = of(&sae, &[1, 4], &[1, 1], Activation::DenseRelu);
    sae.encoder[7 * 12] += 0.25;
    assert_ne!(first, of(&sae, &[1, 4], &[1, 1], Activation::Native), "another rival");
    assert_eq!(dense, of(&sae, &[1, 4], &[1, 1], Activation::DenseRelu), "no rivals");
    sae.token_norm = TokenNorm::Layer;
    assert_ne!(dense, of(&sae, &[1, 4], &[1, 1], Activation::DenseRelu), "another norm");
    let mut sae = RandomSae::new(&mut rng, Architecture::Standard, 12, 9).with_glu(&mut rng);
    let first = of(&sae, &[1, 4], &[1, 1], Activation::Native);
    sae.glu.as_mut().unwrap().1[4] += 0.25;
    let second = of(&sae, &[1, 4], &[1, 1], Activation::Native);
    assert_ne!(first, second, "another bias of the second encoder");
    sae.glu.as_mut().unwrap().0[4 * 12] += 0.25;
    assert_ne!(second, of(&sae, &[1, 4], &[1, 1], Activation::Native), "another row of it");
}

/// So a reference cache keeps what it has when a set grows by latents of other groups.
#[test]
fn a_latent_depends_on_the_rivals_of_its_own_group_alone() {
    let mut rng = Rng::fresh();
    let mut sae = RandomSae::new(&mut rng, Architecture::TopK, 12, 10);
    sae.selection = Selection::Groups; // of two latents each
    let of = |sae: &RandomSae, ids: &[i64]| {
        let set = Latents::new(ids, &vec![1; ids.len()], None).unwrap();
        plan(sae, &set, BackendKind::Cpu, Activation::Native, 1)
    };
    let digests = |plan: &Plan| -> Vec<_> {
        (0..plan.num_latents()).map(|k| plan.column_digest(k)).collect()
    };
    let (two, three) = (of(&sae, &[0, 1]), of(&sae, &[0, 1, 4]));
    assert_eq!(digests(&two), digests(&three)[..2]);
    sae.encoder[5 * 12] += 0.25;
    let other = of(&sae, &[0, 1, 4]);
    assert_eq!(digests(&other)[..2], digests(&two));
    assert_ne!(digests(&other)[2], digests(&three)[2], "its rival is another");
    assert_ne!(other.identity(), three.identity());
    assert_eq!(of(&sae, &[0, 1]).identity(), two.identity());
}

/// What would overflow is more than any memory; all but thresholds stays bounded on the CPU.
#[test]
fn no_workspace_is_too_large_to_be_told() {
    let mut rng = Rng::fresh();
    let most = isize::MAX as usize;
    for rule @ Rule(_, architecture, .., activation) in rules() {
        let (sae, set) = (random_sae(rule, &mut rng, 8, 6), latents(&mut rng, 6));
        let plan = plan(&sae, &set, BackendKind::Cpu, activation, 0);
        let has_thresholds = (architecture, activation) == (Architecture::TopK, Activation::Native);
        for tokens in [1 << 60, most / 8, usize::MAX] {
            let bytes = plan.workspace_size(tokens);
            assert!(if has_thresholds { bytes == most } else { bytes < 1 << 30 }, "{rule:?}");
        }
    }
    for backend in [BackendKind::Auto, BackendKind::Cpu, BackendKind::Cuda] {
        for [k, d] in [[1 << 58, 8], [8, 1 << 58]] {
            assert_eq!(raw_workspace_size(k, d, 16, backend, 0), most, "{backend:?}");
        }
    }
    assert_eq!(raw_workspace_size(8, 8, 1 << 60, BackendKind::Cuda, 0), most);
    let of = |backend| raw_workspace_size(20, 64, 100, backend, 2);
    let either = of(BackendKind::Cpu).max(of(BackendKind::Cuda));
    assert_eq!(of(BackendKind::Auto), either, "whatever it turns out to be");
}

/// What processes that hold some columns each compute together is what one computes alone.
fn parts_agree<T: Element>(rng: &mut Rng, from: fn(f32) -> T, to: fn(T) -> f32) {
    let (tokens, k, d) = (37, 21, 130);
    let cuts = [0, 64, 65, 130];
    for rule @ Rule(encoder, architecture, _, norm, activation) in rules() {
        let native_topk = (architecture, activation) == (Architecture::TopK, Activation::Native);
        let whole_only = match (encoder, norm) {
            (_, TokenNorm::Constant | TokenNorm::Layer) => Some("norm"),
            (Encoder::Glu, _) => Some("GLU"),
            _ => native_topk.then_some("topk"),
        };
        let sae = random_sae(rule, rng, d, k);
        let set = latents(rng, k);
        for backend in [BackendKind::Cpu, BackendKind::Reference] {
            let make = |part| part_plan(&sae, &set, backend, activation, part);
            if let Some(word) = whole_only {
                for part in [Part::Gate, Part::Columns { begin: 0, end: d }] {
                    let error = make(part).err().unwrap();
                    assert_eq!(error.status, Status::Unsupported, "{rule:?}: {error}");
                    assert!(error.message.contains(word), "{error}");
                }
                continue;
            }
            let (whole, gate) = (make(Part::Whole).unwrap(), make(Part::Gate).unwrap());
            let columns: Vec<Plan> = cuts
                .windows(2)
                .map(|cut| make(Part::Columns { begin: cut[0], end: cut[1] }).unwrap())
                .collect();
            let eps = rounding::<T>(&whole);
            let hidden: Vec<T> = rng.normals(tokens * d).into_iter().map(from).collect();
            let of_columns = |cut: &[usize]| -> Vec<T> {
                hidden.chunks(d).flat_map(|row| row[cut[0]..cut[1]].to_vec()).collect()
            };
            let mut dots = vec![0.0f32; tokens * k];
            for (plan, cut) in columns.iter().zip(cuts.windows(2)) {
                assert_eq!((plan.d_in(), gate.d_in()), (cut[1] - cut[0], k));
                let share: Vec<f32> = encode(plan, &of_columns(cut));
                dots.iter_mut().zip(&share).for_each(|(sum, dot)| *sum += dot);
            }
            let exact: Vec<f32> = encode(&whole, &hidden);
            let found: Vec<f32> = encode(&gate, &dots);
            let mut reference = rng.normals(tokens * k);
            for i in 0..tokens * k {
                if (exact[i] == 0.0) != (found[i] == 0.0) {
                    // Both sides of the edge are right: keep it out of the sums.
                    reference[i] = if set.signs()[i % k] > 0 { 1e3 } else { -1e3 };
                    continue;
                }
                let size = hidden[i / k * d..][..d].iter().map(|x| to(*x).powi(2)).sum::<f32>();
                let about = 2.0 * eps * (1.0 + size.sqrt() as f64);
                assert_close("z", found[i] as f64, exact[i] as f64, about);
            }
            let mask: Vec<bool> = (0..tokens).map(|_| rng.below(4) > 0).collect();
            let view = || Some(Tensor::from_slice(&mask, &[tokens]).unwrap());
            let expected = penalty(&whole, &hidden, &reference, view(), f32::NAN);
            let mut found = penalty(&gate, &dots, &reference, view(), f32::NAN);
            let about = 10.0 * eps * (1.0 + expected.loss_sum);
            assert_close("loss_sum", found.loss_sum, expected.loss_sum, about);
            assert_eq!(found.token_count, expected.token_count);
            let largest = expected.grad.iter().fold(0.0f64, |m, g| m.max(g.abs() as f64));
            for (plan, cut) in columns.iter().zip(cuts.windows(2)) {
                let width = cut[1] - cut[0];
                let mut grad = vec![f32::NAN; tokens * width];
                plan.backward(&mut PenaltyArgs {
                    coef: Some(TensorMut::from_slice(&mut found.grad, &[tokens, k]).unwrap()),
                    grad_hidden: Some(TensorMut::from_slice(&mut grad, &[tokens, width]).unwrap()),
                    ..PenaltyArgs::default()
                })
                .unwrap();
                for (i, g) in grad.iter().enumerate() {
                    let e = expected.grad[i / width * d + cut[0] + i % width] as f64;
                    assert_close("grad", *g as f64, e, 20.0 * eps * (1.0 + largest));
                }
            }
        }
    }
}

#[test]
fn parts_over_columns_are_the_whole() {
    let mut rng = Rng::fresh();
    parts_agree::<f32>(&mut rng, |x| x, |x| x);
    parts_agree::<bf16>(&mut rng, bf16::from_f32, bf16::to_f32);
}

/// The gate of exact sums has the bits of a whole plan's: nothing is lost on the way through it.
#[test]
fn the_gate_takes_sums_as_they_are() {
    let mut rng = Rng::fresh();
    let (tokens, k, d) = (9, 70, 12);
    let sae = RandomSae::new(&mut rng, Architecture::Standard, d, k);
    let set = latents(&mut rng, k);
    let make = |part| part_plan(&sae, &set, BackendKind::Cpu, Activation::Preactivation, part);
    let hidden = rng.normals(tokens * d);
    let dots: Vec<f32> = encode(&make(Part::Columns { begin: 0, end: d }).unwrap(), &hidden);
    let found: Vec<f32> = encode(&make(Part::Gate).unwrap(), &dots);
    for (i, (z, dot)) in found.iter().zip(&dots).enumerate() {
        assert_eq!(z.to_bits(), (dot + sae.bias[i % k]).to_bits());
    }
}

#[test]
fn what_a_part_cannot_do_is_refused() {
    let mut rng = Rng::fresh();
    let (k, d) = (3, 8);
    let sae = RandomSae::new(&mut rng, Architecture::Standard, d, k);
    let set = latents(&mut rng, k);
    let make = |part| part_plan(&sae, &set, BackendKind::Cpu, Activation::Native, part);
    for (begin, end) in [(0, 9), (4, 4), (5, 4), (8, 8)] {
        let error = make(Part::Columns { begin, end }).err().unwrap();
        assert_eq!(error.status, Status::InvalidArgument, "{error}");
    }
    let columns = make(Part::Columns { begin: 2, end: 8 }).unwrap();
    let (hidden, reference) = (rng.normals(6), rng.normals(k));
    let mut loss_sum = [f64::NAN];
    let error = columns
        .forward(&mut PenaltyArgs {
            hidden: Some(Tensor::from_slice(&hidden, &[1, 6]).unwrap()),
            reference: Some(Tensor::from_slice(&reference, &[1, k]).unwrap()),
            loss_sum: Some(TensorMut::from_slice(&mut loss_sum, &[1]).unwrap()),
            ..PenaltyArgs::default()
        })
        .unwrap_err();
    assert_eq!(error.status, Status::Unsupported, "{error}");
    assert!(Provenance::of(&set, &columns).is_err());
    let gate = make(Part::Gate).unwrap();
    let whole = make(Part::Whole).unwrap();
    let other = make(Part::Columns { begin: 0, end: 8 }).unwrap();
    let plans = [&columns, &gate, &whole, &other];
    for (i, one) in plans.iter().enumerate() {
        for another in &plans[..i] {
            assert_ne!(one.identity(), another.identity());
            assert_ne!(one.column_digest(0), another.column_digest(0));
        }
    }
}
