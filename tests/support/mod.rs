//! What the tests share: seeded random numbers and small SAEs.
#![allow(dead_code)] // Each test binary uses a part.

use blockem::sae::{Architecture, Layout, Sae, SaeTensors, Selection, TokenNorm};
use blockem::tensor::Tensor;

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
        }
    }

    pub fn open(&self) -> Sae {
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
}
