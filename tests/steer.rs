//! Steering: against the formula in f64 and against the rounding that is promised bit for bit, and
//! what must not change: masked positions, rows without a latent, memory between rows.

mod support;

use blockem::error::Status;
use blockem::plan::{BackendKind, Part, PlanOptions};
use blockem::sae::{Architecture, Layout, Sae, SaeOptions, SaeTensors};
use blockem::steer::{SteerArgs, Steering, TokenNormsArgs, token_norms};
use blockem::tensor::{DType, Device, Element, Stream, Tensor, TensorMut};
use half::{bf16, f16};
use support::Rng;

/// What hidden states may be.
trait Real: Element + PartialEq + std::fmt::Debug + Send + Sync {
    fn of(x: f64) -> Self;
    fn wide(self) -> f64;
    /// Of an f32 sum, rounded once more.
    fn narrow(x: f32) -> Self;
    fn bits(self) -> u64;
}

macro_rules! reals {
    ($($t:ty, $of:expr, $wide:expr, $narrow:expr;)*) => { $(
        impl Real for $t {
            fn of(x: f64) -> $t { ($of)(x) }
            fn wide(self) -> f64 { ($wide)(self) }
            fn narrow(x: f32) -> $t { ($narrow)(x) }
            fn bits(self) -> u64 { self.to_bits() as u64 }
        }
    )* };
}
reals! {
    f64, |x: f64| x, |x: f64| x, |x: f32| x as f64;
    f32, |x: f64| x as f32, |x: f32| x as f64, |x: f32| x;
    f16, f16::from_f64, f16::to_f64, f16::from_f32;
    bf16, bf16::from_f64, bf16::to_f64, bf16::from_f32;
}

/// Decoder rows [F, d] of a random SAE, and the SAE.
fn random_sae(rng: &mut Rng, d: usize, f: usize) -> (Vec<f32>, Sae) {
    let (encoder, bias) = (rng.normals(f * d), rng.normals(f));
    let decoder: Vec<f32> = rng.normals(f * d).iter().map(|w| 3.0 * w).collect();
    let sae = sae_of(&encoder, &bias, &decoder, d);
    (decoder, sae)
}

/// An SAE of scaled hidden states: its dictionary points the same way.
fn sae_of(encoder: &[f32], bias: &[f32], decoder: &[f32], d: usize) -> Sae {
    let f = bias.len();
    let rows = |data| Tensor::from_slice(data, &[f, d]).unwrap();
    let mut tensors = SaeTensors::new(Architecture::Standard, d, f, rows(encoder));
    tensors.encoder_layout = Some(Layout::LatentMajor);
    tensors.encoder_bias = Some(Tensor::from_slice(bias, &[f]).unwrap());
    tensors.decoder_weight = Some(rows(decoder));
    tensors.input_scale = 0.37;
    Sae::from_tensors(&tensors).unwrap()
}

fn unit(row: &[f32]) -> Vec<f32> {
    let norm = row.iter().map(|w| *w as f64 * *w as f64).sum::<f64>().sqrt();
    row.iter().map(|w| (*w as f64 / norm) as f32).collect()
}

fn options(backend: BackendKind, num_threads: usize) -> PlanOptions {
    PlanOptions { backend, num_threads, ..PlanOptions::default() }
}

/// A batch in memory that has more than the batch: NaN elsewhere.
struct Batch<T> {
    shape: [usize; 3],
    stride: [usize; 3],
    data: Vec<T>,
}

impl<T: Real> Batch<T> {
    /// `outer` is the leading dimension with the larger stride, 0 or 1.
    fn new(rng: &mut Rng, shape: [usize; 3], outer: usize, gaps: [usize; 2]) -> Batch<T> {
        let inner = 1 - outer;
        let mut stride = [0, 0, 1];
        stride[inner] = shape[2] + gaps[0];
        stride[outer] = shape[inner] * stride[inner] + gaps[1];
        let data = vec![T::of(f64::NAN); shape[outer] * stride[outer] + 5];
        let mut batch = Batch { shape, stride, data };
        for (b, s) in batch.positions() {
            for (at, x) in batch.at(b, s).zip(rng.normals(shape[2])) {
                batch.data[at] = T::of(20.0 * x as f64);
            }
        }
        batch
    }

    fn positions(&self) -> Vec<(usize, usize)> {
        let [batch, positions, _] = self.shape;
        (0..batch).flat_map(|b| (0..positions).map(move |s| (b, s))).collect()
    }

    fn at(&self, b: usize, s: usize) -> std::ops::Range<usize> {
        let start = b * self.stride[0] + s * self.stride[1];
        start..start + self.shape[2]
    }

    fn view(&mut self) -> TensorMut<'_> {
        let data = self.data.as_mut_ptr().cast();
        // SAFETY: shape and strides stay within `data`, which is borrowed.
        unsafe {
            TensorMut::from_raw(data, T::DTYPE, Device::Cpu, &self.shape, &self.stride).unwrap()
        }
    }

    fn bits(&self) -> Vec<u64> {
        self.data.iter().map(|x| x.bits()).collect()
    }
}

/// Conditions of a batch, and its mask as shares.
struct Conditions {
    rows: Vec<i64>,
    strengths: Vec<f32>,
    shares: Option<(DType, Vec<f32>)>,
    scale: f64,
    scale_tensor: Option<[f32; 1]>,
}

impl Conditions {
    fn random(rng: &mut Rng, batch: usize, positions: usize, latents: usize) -> Conditions {
        let dtype = [DType::U8, DType::Bool, DType::F32][rng.below(3)];
        let mut share = || match dtype {
            DType::F32 => [0.0, 1.0, 0.37, -1.5][rng.below(4)],
            _ => [0.0, 1.0, 1.0][rng.below(3)],
        };
        let shares: Vec<f32> = (0..batch * positions).map(|_| share()).collect();
        Conditions {
            rows: (0..batch).map(|_| rng.below(latents + 1) as i64 - 1).collect(),
            strengths: (0..batch).map(|_| [0.0, 0.7, -0.4, 1.3][rng.below(4)]).collect(),
            shares: (rng.below(3) > 0).then_some((dtype, shares)),
            scale: [1.0, 7.25, -0.3][rng.below(3)],
            scale_tensor: (rng.below(2) == 0).then_some([1.7]),
        }
    }

    fn share(&self, at: usize) -> f32 {
        self.shares.as_ref().map_or(1.0, |(_, shares)| shares[at])
    }

    fn factor(&self, b: usize, share: f32) -> f64 {
        let scale = self.scale * self.scale_tensor.map_or(1.0, |[x]| x as f64);
        self.strengths[b] as f64 * scale * share as f64
    }

    fn steer<T: Real>(&self, steering: &Steering, batch: &mut Batch<T>) {
        let shape = [batch.shape[0], batch.shape[1]];
        let flags: Vec<u8> =
            self.shares.iter().flat_map(|(_, shares)| shares).map(|m| (*m != 0.0) as u8).collect();
        let mask = self.shares.as_ref().map(|(dtype, shares)| match dtype {
            DType::F32 => Tensor::from_slice(shares, &shape).unwrap(),
            // SAFETY: as many bytes, borrowed for longer than the call.
            _ => unsafe {
                let stride = [shape[1], 1];
                Tensor::from_raw(flags.as_ptr(), *dtype, Device::Cpu, &shape, &stride).unwrap()
            },
        });
        let count = [shape[0]];
        let scale_tensor = self.scale_tensor.as_ref();
        let mut args = SteerArgs {
            hidden: batch.view(),
            row: Tensor::from_slice(&self.rows, &count).unwrap(),
            strength: Tensor::from_slice(&self.strengths, &count).unwrap(),
            mask,
            scale: self.scale,
            scale_tensor: scale_tensor.map(|x| Tensor::from_slice(x, &[1]).unwrap()),
        };
        steering.steer(&mut args).unwrap();
    }
}

/// Against the formula; `exact` also bit for bit: an fma in f32, rounded once more.
fn pushes_are_the_formula<T: Real>(rng: &mut Rng, backend: BackendKind, unit_error: f64) {
    let shapes = [[3, 5, 33], [1, 1, 1], [4, 1, 16], [2, 70, 7], [0, 4, 5], [3, 0, 5], [5, 9, 130]];
    for shape in shapes {
        let (d, f) = (shape[2], 9);
        let (decoder, sae) = random_sae(rng, d, f);
        let ids = [4i64, 0, 8, 4];
        let steering = Steering::new(&sae, &ids, &options(backend, 1 + rng.below(3))).unwrap();
        let of = Conditions::random(rng, shape[0], shape[1], ids.len());
        let (outer, gaps) = (rng.below(2), [rng.below(3), rng.below(20)]);
        let mut batch: Batch<T> = Batch::new(rng, shape, outer, gaps);
        let before = batch.data.clone();
        of.steer(&steering, &mut batch);
        let mut touched = vec![false; before.len()];
        for (b, s) in batch.positions() {
            let share = of.share(b * shape[1] + s);
            let pushed = of.rows[b] >= 0 && of.strengths[b] != 0.0 && share != 0.0;
            if !pushed {
                continue;
            }
            let direction = unit(&decoder[ids[of.rows[b] as usize] as usize * d..][..d]);
            let factor = of.factor(b, share);
            for (at, direction) in batch.at(b, s).zip(direction) {
                touched[at] = true;
                let (found, h) = (batch.data[at], before[at].wide());
                let exact = h + factor * direction as f64;
                let slack = unit_error * (h.abs() + (factor * direction as f64).abs());
                assert!((found.wide() - exact).abs() <= slack, "{found:?} {exact} {shape:?}");
                if backend == BackendKind::Cpu {
                    let sum = (factor as f32).mul_add(direction, h as f32);
                    assert_eq!(found.bits(), T::narrow(sum).bits(), "{shape:?}");
                }
            }
        }
        for (at, touched) in touched.into_iter().enumerate() {
            assert!(touched || batch.data[at].bits() == before[at].bits(), "at {at}, {shape:?}");
        }
    }
}

#[test]
fn pushes_are_the_formula_in_every_dtype_and_layout() {
    let mut rng = Rng::fresh();
    for _ in 0..8 {
        pushes_are_the_formula::<f32>(&mut rng, BackendKind::Cpu, 3e-7);
        pushes_are_the_formula::<f16>(&mut rng, BackendKind::Cpu, 1e-3);
        pushes_are_the_formula::<bf16>(&mut rng, BackendKind::Cpu, 8e-3);
        pushes_are_the_formula::<f64>(&mut rng, BackendKind::Reference, 1e-15);
        pushes_are_the_formula::<f32>(&mut rng, BackendKind::Reference, 1e-7);
        pushes_are_the_formula::<bf16>(&mut rng, BackendKind::Reference, 4e-3);
    }
}

#[test]
fn a_position_does_not_depend_on_its_batch_or_the_threads() {
    let mut rng = Rng::fresh();
    let (d, positions) = (300, 700);
    let (_, sae) = random_sae(&mut rng, d, 6);
    // Enough work for a pool of threads.
    let whole = Batch::<bf16>::new(&mut rng, [12, positions, d], 0, [0, 0]);
    let of = Conditions::random(&mut rng, 12, positions, 6);
    let ids: Vec<i64> = (0..6).collect();
    let steered = |threads: usize| {
        let steering = Steering::new(&sae, &ids, &options(BackendKind::Cpu, threads)).unwrap();
        let mut batch = Batch { data: whole.data.clone(), ..whole };
        of.steer(&steering, &mut batch);
        batch
    };
    let expected = steered(1);
    assert_ne!(expected.bits(), whole.bits());
    assert_eq!(steered(3).bits(), expected.bits());
    // One row of the batch, one position of it.
    let steering = Steering::new(&sae, &ids, &options(BackendKind::Cpu, 1)).unwrap();
    for (b, s) in [(0, 0), (5, 313), (11, positions - 1)] {
        let at = whole.at(b, s);
        let data = whole.data[at.clone()].to_vec();
        let mut alone = Batch { shape: [1, 1, d], stride: [d, d, 1], data };
        let shares = of.shares.as_ref().map(|(dtype, m)| (*dtype, vec![m[b * positions + s]]));
        let condition = Conditions {
            rows: vec![of.rows[b]],
            strengths: vec![of.strengths[b]],
            shares,
            scale: of.scale,
            scale_tensor: of.scale_tensor,
        };
        condition.steer(&steering, &mut alone);
        assert_eq!(alone.data, expected.data[at], "row {b}, position {s}");
    }
}

#[test]
fn nan_reaches_what_is_pushed_and_nothing_else() {
    let mut rng = Rng::fresh();
    for backend in [BackendKind::Cpu, BackendKind::Reference] {
        let (_, sae) = random_sae(&mut rng, 20, 4);
        let steering = Steering::new(&sae, &[2], &options(backend, 1)).unwrap();
        let mut batch = Batch::<f32>::new(&mut rng, [3, 4, 20], 0, [0, 0]);
        let strange = f32::from_bits(0x7fc1_2345);
        let (masked, pushed) = (batch.at(0, 1), batch.at(0, 2));
        batch.data[masked.clone()].fill(strange);
        batch.data[pushed.clone()][3] = f32::NAN;
        let mut of = Conditions {
            rows: vec![0, 0, -1],
            strengths: vec![0.5, f32::NAN, 0.5],
            shares: Some((
                DType::U8,
                vec![1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
            )),
            scale: 2.0,
            scale_tensor: None,
        };
        let before = batch.data.clone();
        of.steer(&steering, &mut batch);
        assert!(batch.data[masked].iter().all(|x| x.to_bits() == strange.to_bits()));
        let nan: Vec<usize> = batch.data[pushed]
            .iter()
            .enumerate()
            .filter(|(_, x)| x.is_nan())
            .map(|(i, _)| i)
            .collect();
        assert_eq!(nan, [3]);
        // A strength that is NaN is seen; a row without a latent is not touched.
        assert!(batch.at(1, 0).chain(batch.at(1, 3)).all(|at| batch.data[at].is_nan()));
        assert!(batch.at(2, 0).all(|at| batch.data[at].to_bits() == before[at].to_bits()));
        // Not even by a scale that is NaN, where the strength is 0.
        of.strengths = vec![0.0; 3];
        of.scale_tensor = Some([f32::NAN]);
        let before = batch.bits();
        of.steer(&steering, &mut batch);
        assert_eq!(batch.bits(), before);
    }
}

#[test]
fn directions_are_unit_rows_of_every_file() {
    let mut rng = Rng::fresh();
    let (d, f) = (12, 40);
    let (decoder, sae) = random_sae(&mut rng, d, f);
    let folder = tempfile::tempdir().unwrap();
    let (whole, part) =
        (folder.path().join("whole.safetensors"), folder.path().join("part.safetensors"));
    sae.convert(None, &whole, &mut |_, _| {}).unwrap();
    sae.convert(Some(&[31, 7]), &part, &mut |_, _| {}).unwrap();
    let open = |path| Sae::open(path, &SaeOptions::default()).unwrap();
    let direction = |sae: &Sae, id: i64| {
        let steering = Steering::new(sae, &[id], &PlanOptions::default()).unwrap();
        let mut hidden = vec![0.0f32; d];
        let args = &mut SteerArgs::new(
            TensorMut::from_slice(&mut hidden, &[1, 1, d]).unwrap(),
            Tensor::from_slice(&[0i64], &[1]).unwrap(),
            Tensor::from_slice(&[1.0f32], &[1]).unwrap(),
        );
        steering.steer(args).unwrap();
        (hidden, steering.identity().to_string())
    };
    for id in [7, 31] {
        let (row, identity) = direction(&sae, id);
        for (found, expected) in row.iter().zip(unit(&decoder[id as usize * d..][..d])) {
            assert!(
                (found - expected).abs() <= f32::EPSILON * expected.abs(),
                "{found} {expected}"
            );
        }
        assert_eq!(direction(&open(&whole), id), (row.clone(), identity.clone()));
        assert_eq!(direction(&open(&part), id), (row, identity));
    }
    assert_ne!(direction(&sae, 7).1, direction(&sae, 31).1);
    let error = Steering::new(&open(&part), &[8], &PlanOptions::default()).err().unwrap();
    assert_eq!(error.status, Status::LatentRange, "{error}");
}

#[test]
fn what_cannot_steer_is_refused() {
    let mut rng = Rng::fresh();
    let (d, f) = (6, 5);
    let (mut decoder, sae) = random_sae(&mut rng, d, f);
    let refused = |sae: &Sae, ids: &[i64], options: &PlanOptions, status, word: &str| {
        let error = Steering::new(sae, ids, options).err().expect(word);
        assert_eq!(error.status, status, "{error}");
        assert!(error.message.contains(word), "{error}");
    };
    let plain = PlanOptions::default();
    refused(&sae, &[], &plain, Status::InvalidArgument, "at least one");
    refused(&sae, &[0, 5], &plain, Status::LatentRange, "latent 5");
    refused(&sae, &[-1], &plain, Status::LatentRange, "latent -1");
    let gate = PlanOptions { part: Part::Gate, ..plain };
    refused(&sae, &[0], &gate, Status::Unsupported, "part");
    let without = support::RandomSae::new(&mut rng, Architecture::Standard, d, f).open();
    refused(&without, &[0], &plain, Status::TensorMissing, "decoder");
    decoder[2 * d..3 * d].fill(0.0);
    let encoder = rng.normals(f * d);
    let bias = rng.normals(f);
    let with = |decoder: &[f32]| sae_of(&encoder, &bias, decoder, d);
    refused(&with(&decoder), &[1, 2], &plain, Status::InvalidArgument, "latent 2 is zero");
    assert!(Steering::new(&with(&decoder), &[1, 3], &plain).is_ok());
    // A row whose squares f32 cannot hold has a direction.
    for size in [1e-30f32, 1e30] {
        decoder[2 * d] = size;
        assert!(Steering::new(&with(&decoder), &[2], &plain).is_ok());
    }
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let mut rng = Rng::fresh();
    let (batch, positions, d) = (3, 4, 6);
    let (_, sae) = random_sae(&mut rng, d, 5);
    let steering = Steering::new(&sae, &[0, 1], &PlanOptions::default()).unwrap();
    let mut memory = vec![7.0f32; batch * positions * d];
    let data = memory.as_mut_ptr().cast::<u8>();
    let hidden = |shape: &[usize], stride: &[usize]| {
        // SAFETY: the calls are refused; what they might touch is in `memory`.
        unsafe { TensorMut::from_raw(data, DType::F32, Device::Cpu, shape, stride).unwrap() }
    };
    let (rows, strengths, flags) = ([0i64, 1, -1], [1.0f32; 3], [1u8; 12]);
    let args = |hidden| {
        let (row, strength) = (
            Tensor::from_slice(&rows, &[3]).unwrap(),
            Tensor::from_slice(&strengths, &[3]).unwrap(),
        );
        SteerArgs::new(hidden, row, strength)
    };
    let whole = || hidden(&[batch, positions, d], &[positions * d, d, 1]);
    let refused = |status: Status, word: &str, mut args: SteerArgs<'_>| {
        let error = steering.steer(&mut args).unwrap_err();
        assert_eq!(error.status, status, "{error}");
        assert!(error.message.contains(word), "{error}");
    };
    refused(Status::Shape, "hidden", args(hidden(&[12, d], &[d, 1])));
    refused(Status::Shape, "hidden", args(hidden(&[batch, d, positions], &[24, positions, 1])));
    refused(Status::Shape, "row", args(hidden(&[2, positions, d], &[24, d, 1])));
    refused(Status::Layout, "adjacent", args(hidden(&[batch, 2, d], &[2, d, 2])));
    refused(Status::Layout, "share memory", args(hidden(&[batch, positions, d], &[d, d, 1])));
    refused(Status::Layout, "share memory", args(hidden(&[batch, positions, d], &[24, 0, 1])));
    let strength = Tensor::from_slice(&strengths[..2], &[2]).unwrap();
    refused(Status::Shape, "strength", SteerArgs { strength, ..args(whole()) });
    let row = Tensor::from_slice(&strengths, &[3]).unwrap();
    refused(Status::Dtype, "row", SteerArgs { row, ..args(whole()) });
    let mask = Some(Tensor::from_slice(&flags, &[12]).unwrap());
    refused(Status::Shape, "mask", SteerArgs { mask, ..args(whole()) });
    let mask = Some(Tensor::from_slice(&rows, &[3, 1]).unwrap());
    refused(Status::Shape, "mask", SteerArgs { mask, ..args(whole()) });
    let scale = f64::INFINITY;
    refused(Status::InvalidArgument, "scale", SteerArgs { scale, ..args(whole()) });
    for bad in [2, -2, i64::MAX, i64::MIN] {
        let rows = [0, -1, bad];
        let row = Tensor::from_slice(&rows, &[3]).unwrap();
        refused(Status::LatentRange, "row[2]", SteerArgs { row, ..args(whole()) });
    }
    // SAFETY: refused before it is read.
    let inside = unsafe { Tensor::from_raw(data, DType::F32, Device::Cpu, &[3], &[1]).unwrap() };
    refused(Status::Overlap, "strength", SteerArgs { strength: inside, ..args(whole()) });
    assert!(memory.iter().all(|x| *x == 7.0), "nothing is written");
}

fn norms_are_exact<T: Real>(rng: &mut Rng, backend: BackendKind) {
    for (tokens, d) in [(0, 5), (1, 1), (37, 33), (5, 4096)] {
        let hidden: Vec<T> =
            rng.normals(tokens * (d + 2)).iter().map(|x| T::of(*x as f64)).collect();
        let view = |data: &[T]| unsafe {
            // SAFETY: rows of d elements, d + 2 apart, in the slice.
            let data = data.as_ptr().cast();
            Tensor::from_raw(data, T::DTYPE, Device::Cpu, &[tokens, d], &[d + 2, 1]).unwrap()
        };
        let mut narrow = vec![f32::NAN; tokens];
        let mut wide = vec![f64::NAN; tokens];
        let run = |norms: TensorMut<'_>| {
            let args = &mut TokenNormsArgs { hidden: view(&hidden), norms };
            token_norms(args, backend, 2, Stream::NULL).unwrap();
        };
        run(TensorMut::from_slice(&mut narrow, &[tokens]).unwrap());
        run(TensorMut::from_slice(&mut wide, &[tokens]).unwrap());
        for t in 0..tokens {
            let row = &hidden[t * (d + 2)..][..d];
            let exact = row.iter().map(|x| x.wide() * x.wide()).sum::<f64>().sqrt();
            assert!((wide[t] - exact).abs() <= 1e-14 * exact, "{} {exact}", wide[t]);
            assert_eq!(narrow[t], wide[t] as f32);
        }
    }
}

#[test]
fn norms_are_summed_in_f64() {
    let mut rng = Rng::fresh();
    norms_are_exact::<f32>(&mut rng, BackendKind::Auto);
    norms_are_exact::<f16>(&mut rng, BackendKind::Cpu);
    norms_are_exact::<bf16>(&mut rng, BackendKind::Cpu);
    norms_are_exact::<f64>(&mut rng, BackendKind::Reference);
    // The largest numbers of f32 have a norm, and NaN stays with its token.
    let hidden = [f32::MAX / 4.0, f32::MAX / 4.0, f32::NAN, 0.0, 3.0, 4.0];
    let mut norms = [0.0f32; 3];
    let mut args = TokenNormsArgs {
        hidden: Tensor::from_slice(&hidden, &[3, 2]).unwrap(),
        norms: TensorMut::from_slice(&mut norms, &[3]).unwrap(),
    };
    token_norms(&mut args, BackendKind::Cpu, 1, Stream::NULL).unwrap();
    assert!(norms[0].is_finite() && norms[1].is_nan() && norms[2] == 5.0, "{norms:?}");
    let mut short = [0.0f32; 2];
    let mut args = TokenNormsArgs {
        hidden: Tensor::from_slice(&hidden, &[3, 2]).unwrap(),
        norms: TensorMut::from_slice(&mut short, &[2]).unwrap(),
    };
    let error = token_norms(&mut args, BackendKind::Cpu, 1, Stream::NULL).unwrap_err();
    assert_eq!(error.status, Status::Shape, "{error}");
    let mut args = TokenNormsArgs {
        hidden: Tensor::from_slice(&hidden, &[6]).unwrap(),
        norms: TensorMut::from_slice(&mut short, &[2]).unwrap(),
    };
    let error = token_norms(&mut args, BackendKind::Cpu, 1, Stream::NULL).unwrap_err();
    assert_eq!(error.status, Status::Shape, "{error}");
}
