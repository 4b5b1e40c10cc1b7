//! The frozen vectors of tests/vectors (see its generate.py), through the public interface: every
//! backend within the tolerance that the file states.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use blockem::latents::Latents;
use blockem::penalty::{EncodeArgs, PenaltyArgs, WORKSPACE_ALIGN};
use blockem::plan::{Activation, BackendKind, Plan, PlanOptions};
use blockem::sae::{Architecture, Layout, Sae, SaeTensors};
use blockem::tensor::{Element, Tensor, TensorMut};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

#[test]
fn cpu_backend() {
    for vector in vectors() {
        let plan = vector.plan(BackendKind::Cpu);
        match vector.dtype("hidden") {
            Dtype::F32 => check::<f32, f32>(&vector, &plan, "f32"),
            Dtype::F16 => check::<f16, f32>(&vector, &plan, "f32"),
            Dtype::BF16 => check::<bf16, f32>(&vector, &plan, "f32"),
            other => panic!("{}: hidden is {other:?}", vector.name),
        }
    }
}

#[test]
fn reference_backend() {
    for vector in vectors() {
        check::<f64, f64>(&vector, &vector.plan(BackendKind::Reference), "f64");
    }
}

/// hidden and grad_hidden are H, latents and coef are Z.
fn check<H: Real, Z: Real>(vector: &Vector, plan: &Plan, kind: &str) {
    let (tokens, d, k) = (vector.shape("hidden")[0], plan.d_in(), plan.num_latents());
    let limit = |field: &str| vector.number(&format!("tolerance.{kind}.{field}"));
    let encode = |name: &str| {
        let hidden = vector.read::<H>(name);
        let mut z = vec![Z::default(); tokens * k];
        let hidden = Tensor::from_slice(&hidden, &[tokens, d]).unwrap();
        let latents = TensorMut::from_slice(&mut z, &[tokens, k]).unwrap();
        plan.encode(&mut EncodeArgs::new(hidden, latents)).unwrap();
        z
    };
    vector.compare("latents", &encode("hidden"), limit("latents"), 0.0);
    // The file rounds it to f32.
    vector.compare("reference", &encode("base_hidden"), limit("latents"), 2f64.powi(-24));

    let (hidden, reference) = (vector.read::<H>("hidden"), vector.read::<f32>("reference"));
    let mask = vector.mask();
    let inputs = || PenaltyArgs {
        hidden: Some(Tensor::from_slice(&hidden, &[tokens, d]).unwrap()),
        reference: Some(Tensor::from_slice(&reference, &[tokens, k]).unwrap()),
        mask: mask.as_ref().map(|mask| mask.view()),
        scale: vector.number("scale"),
        ..PenaltyArgs::default()
    };
    let mut space = vec![0u8; plan.workspace_size(tokens) + WORKSPACE_ALIGN];
    let skip = space.as_ptr().align_offset(WORKSPACE_ALIGN);

    let (mut loss_sum, mut token_count, mut latent_loss) = ([0f64], [0f64], vec![0f64; k]);
    let (mut coef, mut grad) = (vec![Z::default(); tokens * k], vec![H::default(); tokens * d]);
    plan.penalty(&mut PenaltyArgs {
        loss_sum: Some(TensorMut::from_slice(&mut loss_sum, &[1]).unwrap()),
        token_count: Some(TensorMut::from_slice(&mut token_count, &[1]).unwrap()),
        latent_loss: Some(TensorMut::from_slice(&mut latent_loss, &[k]).unwrap()),
        coef: Some(TensorMut::from_slice(&mut coef, &[tokens, k]).unwrap()),
        grad_hidden: Some(TensorMut::from_slice(&mut grad, &[tokens, d]).unwrap()),
        workspace: (&mut space[skip..]).into(),
        ..inputs()
    })
    .unwrap();
    vector.compare("loss_sum", &loss_sum, limit("loss_sum"), 0.0);
    vector.compare("token_count", &token_count, 0.0, 0.0);
    vector.compare("latent_loss", &latent_loss, limit("latent_loss"), 0.0);
    vector.compare("coef", &coef, limit("coef"), 0.0);
    let rounding = if kind == "f64" { 0.0 } else { vector.number("tolerance.rounding") };
    vector.compare("grad_hidden", &grad, limit("grad_hidden"), rounding);

    let (mut saved, mut split) = (vec![Z::default(); tokens * k], vec![H::default(); tokens * d]);
    plan.forward(&mut PenaltyArgs {
        coef: Some(TensorMut::from_slice(&mut saved, &[tokens, k]).unwrap()),
        workspace: (&mut space[skip..]).into(),
        ..inputs()
    })
    .unwrap();
    plan.backward(&mut PenaltyArgs {
        coef: Some(TensorMut::from_slice(&mut saved, &[tokens, k]).unwrap()),
        grad_hidden: Some(TensorMut::from_slice(&mut split, &[tokens, d]).unwrap()),
        ..inputs()
    })
    .unwrap();
    let wide = |x: &[H]| x.iter().map(|x| x.wide().to_bits()).collect::<Vec<_>>();
    assert_eq!(wide(&split), wide(&grad), "{}: two calls are not one", vector.name);
}

/// An element that a file holds and f64 can hold exactly.
trait Real: Element + Default {
    fn narrow(value: f64) -> Self;
    fn wide(self) -> f64;
}

macro_rules! reals {
    ($($t:ty: $narrow:expr),*) => { $(impl Real for $t {
        fn narrow(value: f64) -> Self { $narrow(value) }
        fn wide(self) -> f64 { f64::from(self) }
    })* };
}
reals!(f64: |x| x, f32: |x| x as f32, f16: f16::from_f64, bf16: bf16::from_f64);

enum Mask {
    Flags(Vec<u8>),
    Shares(Vec<f32>),
}

impl Mask {
    fn view(&self) -> Tensor<'_> {
        match self {
            Mask::Flags(mask) => Tensor::from_slice(mask, &[mask.len()]).unwrap(),
            Mask::Shares(mask) => Tensor::from_slice(mask, &[mask.len()]).unwrap(),
        }
    }
}

struct Vector {
    name: String,
    bytes: Vec<u8>,
    meta: HashMap<String, String>,
}

/// Every file of the folder.
fn vectors() -> Vec<Vector> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let of_tensors = |path: &PathBuf| path.extension().is_some_and(|e| e == "safetensors");
    let vectors: Vec<Vector> = paths.filter(of_tensors).map(|path| Vector::open(&path)).collect();
    assert!(vectors.len() >= 10);
    vectors
}

impl Vector {
    fn open(path: &Path) -> Vector {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let meta = header.metadata().clone().unwrap();
        Vector { name: meta["name"].clone(), bytes, meta }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    fn has(&self, name: &str) -> bool {
        self.tensors().tensor(name).is_ok()
    }

    fn dtype(&self, name: &str) -> Dtype {
        self.tensors().tensor(name).unwrap().dtype()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.tensors().tensor(name).unwrap().shape().to_vec()
    }

    fn number(&self, key: &str) -> f64 {
        self.meta[key].parse().unwrap()
    }

    fn flag(&self, key: &str) -> bool {
        self.meta[key] == "1"
    }

    /// A tensor, converted; the types of a vector lose nothing on the way.
    fn read<T: Real>(&self, name: &str) -> Vec<T> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap();
        macro_rules! each {
            ($t:ty) => {{
                let one = |b: &[u8]| T::narrow(<$t>::from_le_bytes(b.try_into().unwrap()).into());
                tensor.data().chunks(size_of::<$t>()).map(one).collect()
            }};
        }
        match tensor.dtype() {
            Dtype::F64 => each!(f64),
            Dtype::F32 => each!(f32),
            Dtype::F16 => each!(f16),
            Dtype::BF16 => each!(bf16),
            Dtype::I8 => each!(i8),
            other => panic!("{name} is {other:?}"),
        }
    }

    fn read_if_any(&self, name: &str) -> Option<Vec<f32>> {
        self.has(name).then(|| self.read(name))
    }

    fn mask(&self) -> Option<Mask> {
        self.has("mask").then(|| match self.dtype("mask") {
            Dtype::U8 => Mask::Flags(self.tensors().tensor("mask").unwrap().data().to_vec()),
            _ => Mask::Shares(self.read("mask")),
        })
    }

    fn plan(&self, backend: BackendKind) -> Plan {
        let options = PlanOptions { backend, activation: self.activation(), ..Default::default() };
        Plan::new(&self.sae(), &self.latents(), &options).unwrap()
    }

    fn sae(&self) -> Sae {
        let &[d_sae, d_in] = &self.shape("encoder_weight")[..] else { panic!("not [F, d]") };
        let arrays = |name| self.read_if_any(name);
        let (weight, bias) = (self.read::<f32>("encoder_weight"), arrays("encoder_bias"));
        let (threshold, gate_bias) = (arrays("threshold"), arrays("gate_bias"));
        let (magnitude_bias, log_scale) = (arrays("magnitude_bias"), arrays("magnitude_log_scale"));
        let (decoder_bias, decoder) = (arrays("decoder_bias"), arrays("decoder_weight"));
        let encoder = Tensor::from_slice(&weight, &[d_sae, d_in]).unwrap();
        Sae::from_tensors(&SaeTensors {
            k: (self.meta["k"] != "0").then(|| self.number("k") as usize),
            encoder_layout: Some(Layout::LatentMajor),
            encoder_bias: view(&bias, &[d_sae]),
            decoder_bias: view(&decoder_bias, &[d_in]),
            threshold: view(&threshold, &[d_sae]),
            gate_bias: view(&gate_bias, &[d_sae]),
            magnitude_bias: view(&magnitude_bias, &[d_sae]),
            magnitude_log_scale: view(&log_scale, &[d_sae]),
            decoder_weight: view(&decoder, &[d_sae, d_in]),
            apply_b_dec_to_input: self.flag("apply_b_dec_to_input"),
            rescale_acts_by_decoder_norm: self.flag("rescale_acts_by_decoder_norm"),
            input_scale: self.number("input_scale"),
            ..SaeTensors::new(self.architecture(), d_in, d_sae, encoder)
        })
        .unwrap()
    }

    fn architecture(&self) -> Architecture {
        let name = &self.meta["architecture"];
        let all = [0, 1, 2, 3].map(|code| Architecture::from_code(code).unwrap());
        all.into_iter().find(|a| a.name() == name).unwrap()
    }

    fn activation(&self) -> Activation {
        let name = &self.meta["activation"];
        let all = [0, 1, 2].map(|code| Activation::from_code(code).unwrap());
        all.into_iter().find(|a| a.name() == name).unwrap()
    }

    fn latents(&self) -> Latents {
        let tensors = self.tensors();
        let ids = tensors.tensor("ids").unwrap();
        let ids = ids.data().chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()));
        let signs: Vec<i8> = self.read::<f32>("signs").iter().map(|s| *s as i8).collect();
        let weights = self.read_if_any("weights");
        Latents::new(&ids.collect::<Vec<_>>(), &signs, weights.as_deref()).unwrap()
    }

    /// NaN where NaN is expected, elsewhere within limit + relative |expected|.
    fn compare<T: Real>(&self, name: &str, got: &[T], limit: f64, relative: f64) {
        let want = self.read::<f64>(name);
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let got = got.wide();
            let near = (got - want).abs() <= limit + relative * want.abs();
            assert!(
                near || got.is_nan() && want.is_nan(),
                "{}: {name}[{i}] is {got}, expected {want} within {limit}",
                self.name
            );
        }
    }
}

fn view<'a>(data: &'a Option<Vec<f32>>, shape: &[usize]) -> Option<Tensor<'a>> {
    data.as_ref().map(|data| Tensor::from_slice(data, shape).unwrap())
}
