//! All latents of an SAE over some hidden states, a chunk of latents at a time: nothing of [T, F] is
//! kept, and rows are read from the file as they are needed.

use std::ops::Range;

use crate::backend::cpu::Cpu;
use crate::backend::{Backend, EncodeCall, Matrix, Workspace, kth_largest, rank_threshold};
use crate::error::{Result, bail};
use crate::penalty::WORKSPACE_ALIGN;
use crate::plan::{Activation, gated_rows};
use crate::sae::{Architecture, EncoderRows, Recipe, Sae, Selection};
use crate::tensor::{DType, Stream};

/// Most latents of a chunk: in a file that holds latents as columns, a band that is worth a read.
const CHUNK: usize = 2048;
/// Most numbers of a chunk: 64 Mi floats.
const CHUNK_VALUES: usize = 1 << 26;

/// An SAE, read by a recipe that may differ from its file's own.
#[derive(Clone, Copy)]
pub(crate) struct Dictionary<'a> {
    pub sae: &'a Sae,
    pub recipe: &'a Recipe,
}

/// Hidden states [T, d], row-major.
#[derive(Clone, Copy)]
pub(crate) struct Hidden<'a> {
    pub values: &'a [f32],
    pub tokens: usize,
}

/// Takes a chunk, and the rank gains of its latents where they have any.
type Visit<'a> = dyn FnMut(Chunk<'_>, Option<&[f32]>) -> Result<()> + 'a;

/// z [T, C] of some latents.
pub(crate) struct Chunk<'a> {
    pub latents: Range<usize>,
    pub z: &'a [f32],
}

/// Refuses a file that holds only some of the latents.
pub(crate) fn expect_whole(sae: &Sae) -> Result<()> {
    if let Some(stored) = sae.stored_latents() {
        bail!(
            Unsupported,
            "the file is partial: it holds {stored} of {} latents, and this needs them all; open \
             the whole SAE",
            sae.recipe().d_sae
        );
    }
    Ok(())
}

impl Dictionary<'_> {
    /// Hands every latent's z to `each`, in the order of the dictionary.
    pub fn encode(
        &self,
        hidden: Hidden<'_>,
        each: &mut dyn FnMut(Chunk<'_>) -> Result<()>,
    ) -> Result<()> {
        expect_whole(self.sae)?;
        if self.recipe.architecture != Architecture::TopK {
            return self.pass(hidden, &mut |chunk, _| each(chunk));
        }
        let mut contests = Contests::new(self.recipe, hidden.tokens);
        self.pass(hidden, &mut |chunk, gain| {
            contests.enter(&chunk, gain);
            Ok(())
        })?;
        let thresholds = contests.thresholds();
        let mut z = Vec::new();
        self.pass(hidden, &mut |chunk, gain| {
            z.clear();
            z.extend_from_slice(chunk.z);
            contests.keep_winners(&thresholds, &chunk.latents, gain, &mut z);
            each(Chunk { z: &z, ..chunk })
        })
    }

    /// One pass over the rows: z, or pre-activations where latents compete, and their rank gains.
    fn pass(&self, hidden: Hidden<'_>, each: &mut Visit<'_>) -> Result<()> {
        let Recipe { d_in, d_sae, .. } = *self.recipe;
        let activation = match self.recipe.architecture {
            Architecture::TopK => Activation::Preactivation,
            _ => Activation::Native,
        };
        let step = (CHUNK_VALUES / hidden.tokens.max(1)).clamp(64, CHUNK);
        for start in (0..d_sae).step_by(step) {
            let latents = start..d_sae.min(start + step);
            let ids: Vec<u64> = latents.clone().map(|id| id as u64).collect();
            let mut rows = self.sae.gather_by(self.recipe, &ids)?;
            let gain = rows.rank_gain.take();
            let count = ids.len();
            let rows = gated_rows(rows, self.recipe, activation, None);
            let cpu = Cpu::new(&rows.borrow(), &no_rivals, 0)?;
            let needed = if self.recipe.glu { cpu.workspace_size(hidden.tokens) } else { 0 };
            let mut space = vec![0u8; needed + WORKSPACE_ALIGN];
            let start = space.as_ptr().align_offset(WORKSPACE_ALIGN);
            let mut z = vec![0.0f32; hidden.tokens * count];
            let matrix = |data: *mut f32, row_stride| Matrix {
                data: data.cast(),
                dtype: DType::F32,
                row_stride,
            };
            let call = EncodeCall {
                tokens: hidden.tokens,
                hidden: matrix(hidden.values.as_ptr().cast_mut(), d_in),
                latents: matrix(z.as_mut_ptr(), count),
                workspace: Workspace { data: space[start..].as_mut_ptr(), size: needed },
            };
            // SAFETY: both matrices have their rows, and the backend only reads hidden; the workspace
            // is as large as it asks for.
            unsafe { cpu.encode(&call, Stream::NULL)? };
            each(Chunk { latents, z: &z }, gain.as_deref())?;
        }
        Ok(())
    }
}

fn no_rivals(_: Range<usize>) -> Result<EncoderRows> {
    Ok(EncoderRows::default())
}

/// Who wins among the latents of a TopK SAE: a contest for each token, for each token and group, or
/// for the whole batch.
struct Contests {
    selection: Selection,
    tokens: usize,
    /// Latents of a group.
    group: usize,
    /// Groups of a token.
    groups: usize,
    best: Vec<Best>,
}

/// The largest ranks of a contest so far.
#[derive(Clone)]
struct Best {
    winners: usize,
    ranks: Vec<f32>,
    /// What a rank must be above to enter.
    floor: f32,
}

impl Contests {
    fn new(recipe: &Recipe, tokens: usize) -> Contests {
        let k = recipe.k.unwrap_or(recipe.d_sae);
        let (contests, winners, groups) = match recipe.selection {
            Selection::Batch => (1, k * tokens, 1),
            Selection::Groups => (tokens * k, 1, k),
            Selection::Largest | Selection::Magnitude => (tokens, k, 1),
        };
        let best = Best { winners, ranks: Vec::new(), floor: f32::NEG_INFINITY };
        Contests {
            selection: recipe.selection,
            tokens,
            group: recipe.d_sae / groups,
            groups,
            best: vec![best; contests],
        }
    }

    fn of(&self, token: usize, latent: usize) -> usize {
        match self.selection {
            Selection::Batch => 0,
            _ => token * self.groups + latent / self.group,
        }
    }

    /// NaN comes first.
    fn rank(&self, pre: f32, gain: Option<f32>) -> f32 {
        let pre = gain.map_or(pre, |gain| gain * pre);
        match self.selection {
            _ if pre.is_nan() => f32::INFINITY,
            Selection::Magnitude => pre.abs(),
            _ => pre,
        }
    }

    fn enter(&mut self, chunk: &Chunk<'_>, gain: Option<&[f32]>) {
        let count = chunk.latents.len();
        for token in 0..self.tokens {
            for (i, pre) in chunk.z[token * count..][..count].iter().enumerate() {
                let rank = self.rank(*pre, gain.map(|gain| gain[i]));
                let contest = self.of(token, chunk.latents.start + i);
                self.best[contest].enter(rank);
            }
        }
    }

    /// What a rank must be above to win.
    fn thresholds(&mut self) -> Vec<f32> {
        let by_magnitude = self.selection == Selection::Magnitude;
        let threshold = |best: &mut Best| {
            rank_threshold(kth_largest(&mut best.ranks, best.winners), by_magnitude)
        };
        self.best.iter_mut().map(threshold).collect()
    }

    fn keep_winners(
        &self,
        thresholds: &[f32],
        latents: &Range<usize>,
        gain: Option<&[f32]>,
        z: &mut [f32],
    ) {
        for (token, row) in z.chunks_exact_mut(latents.len()).enumerate() {
            for (i, z) in row.iter_mut().enumerate() {
                let rank = self.rank(*z, gain.map(|gain| gain[i]));
                if rank <= thresholds[self.of(token, latents.start + i)] {
                    *z = 0.0;
                }
            }
        }
    }
}

impl Best {
    fn enter(&mut self, rank: f32) {
        if rank > self.floor {
            self.ranks.push(rank);
            if self.ranks.len() >= 2 * self.winners + 64 {
                self.floor = kth_largest(&mut self.ranks, self.winners);
                self.ranks.truncate(self.winners);
            }
        }
    }
}
