//! What the tests share: seeded random numbers and small SAEs.
#![allow(dead_code)] // Each test binary uses a part.

use std::collections::HashMap;

use blockem::plan::Activation;
use blockem::sae::{Architecture, Layout, Sae, SaeOptions, SaeTensors, Selection, TokenNorm};
use blockem::tensor::Tensor;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

/// xorshift64*: fresh numbers for each run, repeatable from the seed that a failure prints.
pub struct Rng(u64);

impl Rng {
    /// Seeded by the clock, or by BLOCKEM_TEST_SEED; says which.
    pub fn fresh() -> Rng {
        let clock = || {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.unwrap().as_nanos() as u64
        };
        let given = std::env::var("BLOCKEM_TEST_SEED").ok().map(|s| s.parse().unwrap());
        let seed = given.unwrap_or_else(clock) | 1;
        println!("BLOCKEM_TEST_SEED={seed}");
        Rng(seed)
    }

    /// The same numbers each time.
    pub fn of(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 11) as usize % n
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f32 {
        let (u, v) = (1.0 - self.unit(), self.unit());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// How a latent comes about.
#[derive(Clone, Copy, Debug)]
pub struct Rule(pub Encoder, pub Architecture, pub Selection, pub TokenNorm, pub Activation);

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Encoder {
    Plain,
    /// Gated by the sigmoid of a second one.
    Glu,
}

impl Rule {
    pub fn sae(self, rng: &mut Rng, d: usize, f: usize) -> RandomSae {
        let Rule(encoder, architecture, selection, token_norm, _) = self;
        let sae = RandomSae::new(rng, architecture, d, f);
        let sae = if encoder == Encoder::Glu { sae.with_glu(rng) } else { sae };
        RandomSae { selection, token_norm, ..sae }
    }
}

/// The arrays of a random SAE; encoder rows [F, d].
pub struct RandomSae {
    pub architecture: Architecture,
    pub d: usize,
    pub f: usize,
    pub encoder: Vec<f32>,
    pub bias: Vec<f32>,
    pub threshold: Vec<f32>,
    pub gate_bias: Vec<f32>,
    pub r_mag: Vec<f32>,
    pub selection: Selection,
    pub token_norm: TokenNorm,
    /// Of a GLU encoder: the second one's rows [F, d] and biases. Such SAEs come from files alone.
    pub glu: Option<(Vec<f32>, Vec<f32>)>,
}

impl RandomSae {
    pub fn new(rng: &mut Rng, architecture: Architecture, d: usize, f: usize) -> RandomSae {
        let scale = 1.0 / (d as f32).sqrt();
        RandomSae {
            architecture,
            d,
            f,
            encoder: rng.normals(f * d).iter().map(|w| w * scale).collect(),
            bias: rng.normals(f).iter().map(|b| 0.2 * b).collect(),
            threshold: (0..f).map(|_| 0.3 * rng.unit() as f32).collect(),
            gate_bias: rng.normals(f).iter().map(|b| 0.2 * b).collect(),
            r_mag: rng.normals(f).iter().map(|b| 0.2 * b).collect(),
            selection: Selection::Largest,
            token_norm: TokenNorm::None,
            glu: None,
        }
    }

    /// The same with a second encoder.
    pub fn with_glu(self, rng: &mut Rng) -> RandomSae {
        let second = RandomSae::new(rng, self.architecture, self.d, self.f);
        RandomSae { glu: Some((second.encoder, second.bias)), ..self }
    }

    pub fn open(&self) -> Sae {
        if let Some(glu) = &self.glu {
            return self.open_file(glu);
        }
        let vector = |data| Some(Tensor::from_slice(data, &[self.f]).unwrap());
        let encoder = Tensor::from_slice(&self.encoder, &[self.f, self.d]).unwrap();
        let mut tensors = SaeTensors::new(self.architecture, self.d, self.f, encoder);
        tensors.encoder_layout = Some(Layout::LatentMajor);
        match self.architecture {
            Architecture::Gated => {
                tensors.magnitude_bias = vector(&self.bias);
                tensors.gate_bias = vector(&self.gate_bias);
                tensors.magnitude_log_scale = vector(&self.r_mag);
            }
            _ => tensors.encoder_bias = vector(&self.bias),
        }
        if self.architecture == Architecture::JumpRelu {
            tensors.threshold = vector(&self.threshold);
        }
        if self.architecture == Architecture::TopK {
            tensors.k = Some((self.f / 2).max(1));
            tensors.selection = self.selection;
        }
        tensors.token_norm = self.token_norm;
        Sae::from_tensors(&tensors).unwrap()
    }

    /// As a bare file, which the SAE holds open when its folder goes.
    fn open_file(&self, (weight, bias): &(Vec<f32>, Vec<f32>)) -> Sae {
        let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let arrays = [
            ("W_enc", bytes(&self.encoder), vec![self.f, self.d]),
            ("b_enc", bytes(&self.bias), vec![self.f]),
            ("W_enc_glu", bytes(weight), vec![self.f, self.d]),
            ("b_enc_glu", bytes(bias), vec![self.f]),
            ("threshold", bytes(&self.threshold), vec![self.f]),
        ];
        let used = &arrays[..if self.architecture == Architecture::JumpRelu { 5 } else { 4 }];
        let views = used.iter().map(|(name, bytes, shape)| {
            (*name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
        });
        let cfg = json!({
            "architecture": self.architecture.name(),
            "d_in": self.d,
            "d_sae": self.f,
            "k": (self.f / 2).max(1),
            "selection": self.selection.name(),
            "layout": "latent_major",
            "apply_b_dec_to_input": false,
            "normalize_activations": self.token_norm.name(),
            "use_glu_encoder": true,
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("glu.safetensors");
        let metadata = HashMap::from([("cfg".to_string(), cfg.to_string())]);
        safetensors::serialize_to_file(views, Some(metadata), &path).unwrap();
        Sae::open(&path, &SaeOptions::default()).unwrap()
    }
}
