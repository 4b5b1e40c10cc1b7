//! Random numbers of the backends' tests.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::sae::TokenNorm;

/// xorshift64*; every run starts elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Random(pub u64);

impl Random {
    /// Seeded by the clock, or by BLOCKEM_TEST_SEED; says which, so that a failure shows it.
    pub fn fresh() -> Random {
        let clock = || {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
            now.as_nanos() as u64
        };
        let given = std::env::var("BLOCKEM_TEST_SEED").ok();
        let seed = given.map_or_else(clock, |seed| seed.parse().expect("a number")) | 1;
        println!("BLOCKEM_TEST_SEED={seed}");
        Random(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 33) as usize % n
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Roughly normal, standard deviation 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| (self.bits() >> 40) as f32 / (1u64 << 24) as f32).sum();
        (sum - 2.0) * 1.73
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// Encoder rows of norm about 1, `stride` apart, centred where layer norm needs it.
    pub fn rows(&mut self, count: usize, d_in: usize, stride: usize, norm: TokenNorm) -> Vec<f32> {
        let size = 1.0 / (d_in as f32).sqrt();
        let mut rows: Vec<f32> = self.normals(count * stride).iter().map(|w| w * size).collect();
        if norm == TokenNorm::Layer {
            for row in rows.chunks_mut(stride) {
                let mean = row[..d_in].iter().map(|w| *w as f64).sum::<f64>() / d_in as f64;
                row.iter_mut().for_each(|w| *w = (*w as f64 - mean) as f32);
            }
        }
        rows
    }
}
