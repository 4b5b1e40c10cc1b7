//! Blocked latent sets: which latents, in which direction, how strongly; and their K0.json.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result, Status, bail};
use crate::json;
use crate::plan::{Part, Plan};
use crate::sae::{Sae, read_small};

/// The key under which [`Latents::save`] records where a set belongs.
const PROVENANCE: &str = "blockem";
/// The largest K0.json; parsed, it takes up to 90 times its bytes. Sixty thousand latents fit.
const LIMIT: usize = 512 << 10;

/// A set of blocked latents. The order of its ids is the order of every [T, K] array.
#[derive(Clone, Debug, PartialEq)]
pub struct Latents {
    ids: Vec<u64>,
    signs: Vec<i8>,
    weights: Vec<f32>,
    provenance: Option<Provenance>,
    /// Keys of the file that are not ours; saving keeps them.
    extra: Map<String, Value>,
}

/// The SAE and the rule for which a set was made.
#[derive(Clone, Debug, PartialEq)]
pub struct Provenance {
    pub d_in: usize,
    pub d_sae: usize,
    /// [`Plan::identity`] of a plan of the set as the file orders it.
    pub identity: String,
    pub activation: String,
    pub layer: Option<i64>,
    /// sha256 of the SAE's weights file, when it was asked for.
    pub sae_sha256: Option<String>,
}

impl Provenance {
    /// Of a set, from a plan of it. A part of a plan has another d and identity: refused.
    pub fn of(latents: &Latents, plan: &Plan) -> Result<Provenance> {
        if plan.latent_ids() != latents.ids() || plan.signs() != latents.signs() {
            bail!(
                InvalidArgument,
                "the plan is of other latents than the set, or has them in another order: save a set \
                 with a plan of its own"
            );
        }
        if plan.part() != Part::Whole {
            bail!(
                InvalidArgument,
                "a latent set is saved with a whole plan, not with a part of one"
            );
        }
        Ok(Provenance {
            d_in: plan.d_in(),
            d_sae: plan.d_sae(),
            identity: plan.identity_in_file(),
            activation: plan.activation().name().to_owned(),
            layer: plan.layer(),
            sae_sha256: None,
        })
    }

    /// With the sha256 of the SAE's weights file, which is read.
    pub fn with_file(self, sae: &Sae) -> Result<Provenance> {
        let recipe = sae.recipe();
        if [recipe.d_in, recipe.d_sae] != [self.d_in, self.d_sae] {
            bail!(InvalidArgument, "the SAE is not the one that the plan was made from");
        }
        let sae_sha256 = Some(sae.file_sha256(&mut |_, _| {})?);
        Ok(Provenance { sae_sha256, ..self })
    }
}

impl Latents {
    /// Latents in the given order: sign +1 blocks a rise (K+), -1 a fall (K-); weights default to 1.
    pub fn new(ids: &[i64], signs: &[i8], weights: Option<&[f32]>) -> Result<Latents> {
        if ids.is_empty() {
            bail!(InvalidArgument, "a latent set needs at least one latent");
        }
        if signs.len() != ids.len() || weights.is_some_and(|w| w.len() != ids.len()) {
            bail!(Shape, "ids, signs and weights of a latent set must have one length");
        }
        let mut seen = HashMap::with_capacity(ids.len());
        for (id, sign) in ids.iter().zip(signs) {
            if *id < 0 {
                bail!(LatentRange, "latent {id} is negative");
            }
            if !matches!(sign, 1 | -1) {
                bail!(InvalidArgument, "latent {id} has the sign {sign}; it must be 1 or -1");
            }
            match seen.insert(*id, *sign) {
                None => {}
                Some(other) if other == *sign => {
                    bail!(LatentDuplicate, "latent {id} stands in the set twice")
                }
                Some(_) => {
                    bail!(LatentDuplicate, "latent {id} stands in both K_pos and K_neg; keep one")
                }
            }
        }
        let weights = weights.map_or_else(|| vec![1.0; ids.len()], <[f32]>::to_vec);
        if let Some(i) = weights.iter().position(|w| !w.is_finite() || *w < 0.0) {
            bail!(
                InvalidArgument,
                "latent {} has the weight {}; it must be finite and not negative",
                ids[i],
                weights[i]
            );
        }
        Ok(Latents {
            ids: ids.iter().map(|id| *id as u64).collect(),
            signs: signs.to_vec(),
            weights,
            provenance: None,
            extra: Map::new(),
        })
    }

    /// Reads the authors' K0.json: `K_pos`, `K_neg`, optional `weights` {"<id>": w}. Columns are
    /// K_pos then K_neg, in the file's order. A set that records another SAE's shape is refused.
    pub fn open(path: impl AsRef<Path>, sae: &Sae) -> Result<Latents> {
        let path = path.as_ref();
        let text = read_small(path, LIMIT)?;
        let set = Latents::from_json(&text)
            .and_then(|set| set.check_against(sae).map(|()| set))
            .map_err(|e| Error::new(e.status, format!("{}: {}", path.display(), e.message)))?;
        Ok(set)
    }

    /// Parses the text of a K0.json.
    pub fn from_json(text: &[u8]) -> Result<Latents> {
        if text.len() > LIMIT {
            bail!(Format, "{} bytes are no latent set: {LIMIT} at most", text.len());
        }
        let value = json::parse(text).map_err(|reason| Error::new(Status::Format, reason))?;
        let Value::Object(mut file) = value else {
            bail!(Format, "a latent set is a JSON object with K_pos and K_neg");
        };
        let pos = take_ids(&mut file, "K_pos")?;
        let neg = take_ids(&mut file, "K_neg")?;
        if pos.is_empty() && neg.is_empty() {
            bail!(Format, "K_pos and K_neg are both empty; a latent set needs at least one latent");
        }
        let signs: Vec<i8> = pos.iter().map(|_| 1).chain(neg.iter().map(|_| -1)).collect();
        let ids: Vec<i64> = pos.into_iter().chain(neg).collect();
        let weights = take_weights(&mut file, &ids)?;
        let provenance = file.remove(PROVENANCE).map(|v| parse_provenance(&v)).transpose()?;
        let set = Latents::new(&ids, &signs, weights.as_deref())?;
        Ok(Latents { provenance, extra: file, ..set })
    }

    /// The text of a K0.json, with the keys that the set was read with.
    pub fn to_json(&self, provenance: Option<&Provenance>) -> Value {
        let side = |sign| -> Vec<u64> {
            let of = self.ids.iter().zip(&self.signs).filter(|(_, s)| **s == sign);
            of.map(|(id, _)| *id).collect()
        };
        let mut file = Map::new();
        file.insert("K_pos".into(), json!(side(1)));
        file.insert("K_neg".into(), json!(side(-1)));
        if self.weights.iter().any(|w| *w != 1.0) {
            let weights = self.ids.iter().zip(&self.weights);
            let weights = weights.map(|(id, w)| (id.to_string(), json!(w)));
            file.insert("weights".into(), Value::Object(weights.collect()));
        }
        file.extend(self.extra.clone());
        if let Some(p) = provenance.or(self.provenance.as_ref()) {
            let mut record = json!({
                "d_in": p.d_in,
                "d_sae": p.d_sae,
                "identity": p.identity,
                "activation": p.activation,
                "layer": p.layer,
            });
            if let Some(sha256) = &p.sae_sha256 {
                record["sae_sha256"] = json!(sha256);
            }
            file.insert(PROVENANCE.into(), record);
        }
        Value::Object(file)
    }

    /// Writes K0.json whole or not at all. The file, and whoever reads it, has K_pos before K_neg,
    /// each in this set's order. Without provenance the set keeps what it was read with.
    pub fn save(&self, path: impl AsRef<Path>, provenance: Option<&Provenance>) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.to_json(provenance))
            .map_err(|e| Error::new(Status::Internal, e.to_string()))?;
        let path = path.as_ref();
        crate::output::write_whole(path, |file| {
            writeln!(file, "{text}").map_err(|e| Error::io(path, "write the latent set", &e))
        })
    }

    /// Refuses a set that does not fit the SAE.
    pub fn check_against(&self, sae: &Sae) -> Result<()> {
        let recipe = sae.recipe();
        if let Some(p) = &self.provenance
            && (p.d_in, p.d_sae) != (recipe.d_in, recipe.d_sae)
        {
            bail!(
                ProvenanceMismatch,
                "the set was made for an SAE with d = {} and {} latents, this one has d = {} and \
                 {}; open the SAE it belongs to, or remove the key \"{PROVENANCE}\"",
                p.d_in,
                p.d_sae,
                recipe.d_in,
                recipe.d_sae
            );
        }
        if let Some(id) = self.ids.iter().find(|id| **id >= recipe.d_sae as u64) {
            bail!(LatentRange, "latent {id} does not exist: the SAE has {}", recipe.d_sae);
        }
        Ok(())
    }

    /// K
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Never: a set has at least one latent.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    pub fn ids(&self) -> &[u64] {
        &self.ids
    }

    pub fn signs(&self) -> &[i8] {
        &self.signs
    }

    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    pub fn provenance(&self) -> Option<&Provenance> {
        self.provenance.as_ref()
    }
}

fn take_ids(file: &mut Map<String, Value>, key: &str) -> Result<Vec<i64>> {
    let Some(value) = file.remove(key) else {
        bail!(Format, "the key {key} is missing; write an empty list for an empty side");
    };
    let ids = value.as_array().map(|list| list.iter().map(json::whole_number).collect());
    match ids {
        Some(Some(ids)) => Ok(ids),
        _ => bail!(Format, "{key} must be a list of whole numbers"),
    }
}

fn take_weights(file: &mut Map<String, Value>, ids: &[i64]) -> Result<Option<Vec<f32>>> {
    let Some(value) = file.remove("weights") else { return Ok(None) };
    let Value::Object(given) = value else {
        bail!(Format, "weights must be an object of \"<latent id>\": weight");
    };
    let column: HashMap<i64, usize> = ids.iter().enumerate().map(|(i, id)| (*id, i)).collect();
    let mut weights = vec![1.0; ids.len()];
    for (id, weight) in &given {
        let Some(at) = id.parse().ok().and_then(|id: i64| column.get(&id)) else {
            bail!(Format, "weights names {id:?}, which is in neither K_pos nor K_neg");
        };
        match weight.as_f64() {
            Some(w) => weights[*at] = w as f32,
            None => bail!(Format, "the weight of latent {id} is not a number"),
        }
    }
    Ok(Some(weights))
}

fn parse_provenance(value: &Value) -> Result<Provenance> {
    let size = |key| value[key].as_u64().map(|n| n as usize);
    let text = |key| value[key].as_str().map(str::to_owned);
    let (Some(d_in), Some(d_sae), Some(identity), Some(activation)) =
        (size("d_in"), size("d_sae"), text("identity"), text("activation"))
    else {
        bail!(Format, "the key \"{PROVENANCE}\" must hold d_in, d_sae, identity and activation");
    };
    let layer = value["layer"].as_i64();
    Ok(Provenance { d_in, d_sae, identity, activation, layer, sae_sha256: text("sae_sha256") })
}
