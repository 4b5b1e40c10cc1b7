//! Reference caches: z of the base model at the blocked latents, for each example, in one file.
//!
//! A file belongs to one base model, site, dtype of hidden and numerics; that is its [`Identity`].
//! In it an example is known by its [`Key`], a latent by [`Plan::column_digest`]. The columns of an
//! example that are stored by one call are one record: a group. Sets that share latents share
//! columns, and new latents add a group to an example.

mod record;
mod store;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt::Display;
use std::path::Path;

use redb::{ReadableTable, ReadableTableMetadata};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result, Status, bail};
use crate::plan::Plan;
use crate::sae::Site;
use crate::tensor::{DType, Device, Tensor, TensorMut};
use record::{Header, Kind, joined, seal, unseal};
use store::{COLUMNS, EXAMPLES, GROUPS, META, Store, VALUES};

/// What [`Cache::example_key`] makes of an example: 16 bytes of a digest of the identity, token ids
/// and positions, then 16 of its context, which are zero without one.
pub type Key = [u8; 32];

/// The part of a key that does not depend on the context.
const TEXT: usize = 16;

/// Longest name of a base model, in bytes: longer ones are for the caller to digest.
pub const MAX_BASE_MODEL: usize = 255;

/// Longest name of a note, and longest note, in bytes.
pub const MAX_NOTE_NAME: usize = 255;
pub const MAX_NOTE: usize = 1 << 16;

/// How a cache is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum Mode {
    /// Any number of processes at once, while none writes.
    #[default]
    Read = 0,
    /// One process, while none reads.
    Write = 1,
    /// As `Write`; a file that is not there is made.
    Create = 2,
}

impl Mode {
    pub fn from_code(code: i32) -> Option<Mode> {
        use Mode::*;
        [Read, Write, Create].into_iter().find(|m| *m as i32 == code)
    }
}

/// What the caller expects of a file, or wants of a new one. What is absent is not compared.
#[derive(Clone, Copy, Default)]
pub struct CacheOptions<'a> {
    pub mode: Mode,
    /// Names the weights of the base model: a name and revision, or better a digest.
    pub base_model: Option<&'a str>,
    /// Where hidden is read; Unknown means where the plan's SAE reads.
    pub site: Site,
    /// 0-based decoder block in which the site lies; absent means the plan's. Of a plan whose SAE says
    /// nothing, the block whose output is encoded.
    pub layer: Option<i64>,
    /// Of hidden.
    pub dtype: Option<DType>,
    /// Gives the numerics.
    pub plan: Option<&'a Plan>,
}

/// What all z of a file have in common. Another one is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub base_model: String,
    pub site: Site,
    /// None of a site that is of no block.
    pub layer: Option<i64>,
    pub dtype: DType,
    /// [`Plan::numerics`]
    pub numerics: String,
}

/// How much a cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub examples: u64,
    /// Latents of which at least one example has its z.
    pub columns: u64,
}

/// An open cache. Any number of threads may use it; those that write take turns.
pub struct Cache {
    store: Store,
    identity: Identity,
    digest: Key,
}

impl Cache {
    pub fn open(path: impl AsRef<Path>, options: &CacheOptions) -> Result<Cache> {
        let path = path.as_ref();
        let expected = Expected::new(options)?;
        if options.mode == Mode::Create && !store::exists(path)? {
            let identity = expected.identity(options.plan)?;
            store::create(path, &identity.to_json())?;
        }
        let cache = Cache::of(Store::open(path, options.mode != Mode::Read)?)?;
        cache.check(&expected)?;
        if let (Mode::Read, Some(plan)) = (options.mode, options.plan) {
            cache.check_columns(plan)?;
        }
        Ok(cache)
    }

    fn of(store: Store) -> Result<Cache> {
        let identity = store.read(|transaction| {
            let meta = transaction.open_table(META)?;
            match meta.get(IDENTITY)? {
                Some(sealed) => Identity::from_json(unseal(IDENTITY, sealed.value())?),
                None => bail!(Format, "not a reference cache: it has no identity"),
            }
        })?;
        Ok(Cache { digest: identity.digest(), store, identity })
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn counts(&self) -> Result<Counts> {
        self.store.read(|transaction| {
            Ok(Counts {
                examples: transaction.open_table(EXAMPLES)?.len()?,
                columns: transaction.open_table(COLUMNS)?.len()?,
            })
        })
    }

    /// Digest of an example: the cache's identity, the token ids, and the positions that the model
    /// gives them, which are 0, 1, 2, ... when absent.
    ///
    /// context: all else of the example that the base model sees, such as an image's pixels or a
    /// digest of them; empty when there is nothing.
    pub fn example_key(
        &self,
        token_ids: &[i64],
        positions: Option<&[i64]>,
        context: &[u8],
    ) -> Result<Key> {
        if token_ids.is_empty() {
            bail!(InvalidArgument, "an example has at least one token");
        }
        if let Some(positions) = positions
            && positions.len() != token_ids.len()
        {
            bail!(
                Shape,
                "the example has {} token ids and {} positions",
                token_ids.len(),
                positions.len()
            );
        }
        let mut hash = Sha256::new();
        hash.update(b"blockem example 2");
        hash.update(self.digest);
        hash.update((token_ids.len() as u64).to_le_bytes());
        for id in token_ids {
            hash.update(id.to_le_bytes());
        }
        for i in 0..token_ids.len() {
            hash.update(positions.map_or(i as i64, |p| p[i]).to_le_bytes());
        }
        let mut key = [0; 32];
        key[..TEXT].copy_from_slice(&hash.finalize()[..TEXT]);
        if !context.is_empty() {
            let digest = Sha256::new().chain_update(b"blockem context 2").chain_update(context);
            key[TEXT..].copy_from_slice(&digest.finalize()[..32 - TEXT]);
        }
        Ok(key)
    }

    /// What [`Cache::put_note`] stored under this name.
    pub fn note(&self, name: &str) -> Result<Option<String>> {
        let key = note_key(name)?;
        self.store.read(|transaction| {
            let Some(sealed) = transaction.open_table(META)?.get(key.as_slice())? else {
                return Ok(None);
            };
            match str::from_utf8(unseal(&key, sealed.value())?) {
                Ok(text) => Ok(Some(text.to_owned())),
                Err(_) => bail!(Format, "damaged: its note '{name}' is not UTF-8"),
            }
        })
    }

    /// Keeps a short text beside the examples, such as how a caller made their contexts. It is
    /// written once: the same again changes nothing, another is refused.
    pub fn put_note(&self, name: &str, text: &str) -> Result<()> {
        let key = note_key(name)?;
        if text.is_empty() || text.len() > MAX_NOTE {
            bail!(
                InvalidArgument,
                "the note '{name}' has {} bytes; 1 to {MAX_NOTE} are possible",
                text.len()
            );
        }
        if self.note(name)?.is_none() {
            self.store.write(|transaction| {
                let mut meta = transaction.open_table(META)?;
                if meta.get(key.as_slice())?.is_none() {
                    meta.insert(key.as_slice(), seal(&key, text.bytes()).as_slice())?;
                }
                Ok(())
            })?;
        }
        match self.note(name)?.unwrap_or_default() {
            there if there == text => Ok(()),
            there => self.stale(&format!("note '{name}'"), there, text),
        }
    }

    /// [n, K], row-major: which examples lack which of the plan's latents.
    pub fn missing(&self, plan: &Plan, keys: &[Key]) -> Result<Vec<bool>> {
        self.check_plan(plan)?;
        let columns = columns(plan);
        self.store.read(|transaction| {
            let examples = transaction.open_table(EXAMPLES)?;
            let mut groups = Groups::new(transaction.open_table(GROUPS)?, &columns);
            let mut missing = vec![true; keys.len() * columns.len()];
            for (row, key) in missing.chunks_exact_mut(columns.len()).zip(keys) {
                for group in Example::read(&examples, key)?.map_or(Vec::new(), |e| e.groups) {
                    for (k, _) in &groups.get(&group)?.places {
                        row[*k] = false;
                    }
                }
            }
            Ok(missing)
        })
    }

    /// Stores z [T, K] of each example, in one transaction that is on the disk when this returns.
    /// What is there already stays: a column is written once. Returns how many were written.
    pub fn put(&self, plan: &Plan, keys: &[Key], latents: &[Tensor]) -> Result<u64> {
        self.check_plan(plan)?;
        if keys.len() != latents.len() {
            bail!(Shape, "{} keys and {} arrays of latents", keys.len(), latents.len());
        }
        for (i, z) in latents.iter().enumerate() {
            check_latents(i, z, plan.num_latents())?;
            check_finite(i, z)?;
        }
        let columns = columns(plan);
        let mut stored = Vec::new();
        let written = self.store.write(|transaction| {
            let mut examples = transaction.open_table(EXAMPLES)?;
            let mut known = transaction.open_table(COLUMNS)?;
            let mut groups = transaction.open_table(GROUPS)?;
            let mut values = transaction.open_table(VALUES)?;
            let mut written = 0;
            for (i, (key, z)) in keys.iter().zip(latents).enumerate() {
                let tokens = z.shape()[0];
                let mut example = Example::read(&examples, key)?
                    .unwrap_or(Example { tokens: tokens as u64, groups: Vec::new() });
                check_tokens(i, z, example.tokens)?;
                let mut absent = vec![true; columns.len()];
                for group in &example.groups {
                    for (k, _) in Group::read(&groups, group, &columns)?.places {
                        absent[k] = false;
                    }
                }
                let new: Vec<usize> = (0..columns.len()).filter(|k| absent[*k]).collect();
                if new.is_empty() {
                    continue;
                }
                let members: Vec<u8> = new.iter().flat_map(|k| columns[*k].digest).collect();
                let group: Key = Sha256::digest(&members).into();
                if groups.get(group.as_slice())?.is_none() {
                    let record = seal(&group, Kind::Latents.head().into_iter().chain(members));
                    groups.insert(group.as_slice(), record.as_slice())?;
                }
                let name = joined(key, &group);
                let head = Header::latents(new.len()).to_bytes();
                let elements = new.iter().flat_map(|k| (0..tokens).map(|t| element(z, t, *k)));
                let record =
                    seal(&name, head.into_iter().chain(elements.flat_map(f32::to_le_bytes)));
                values.insert(name.as_slice(), record.as_slice())?;
                example.groups.push(group);
                examples.insert(key.as_slice(), example.to_record(key).as_slice())?;
                stored.push((*key, group));
                written += new.len() as u64;
            }
            for column in columns.iter().filter(|_| written > 0) {
                if known.get(column.digest.as_slice())?.is_none() {
                    let id = seal(&column.digest, column.id.to_le_bytes());
                    known.insert(column.digest.as_slice(), id.as_slice())?;
                }
            }
            Ok(written)
        })?;
        self.expect_stored(&stored)?;
        Ok(written)
    }

    /// Reads back what was stored: in a file that was damaged before, the store may have written
    /// over pages of its own.
    fn expect_stored(&self, stored: &[(Key, Key)]) -> Result<()> {
        self.store.read(|transaction| {
            let examples = transaction.open_table(EXAMPLES)?;
            let groups = transaction.open_table(GROUPS)?;
            let values = transaction.open_table(VALUES)?;
            for (key, group) in stored {
                let name = joined(key, group);
                let is_named = Example::read(&examples, key)?
                    .is_some_and(|example| example.groups.contains(group));
                let (Some(members), Some(record), true) =
                    (groups.get(group.as_slice())?, values.get(name.as_slice())?, is_named)
                else {
                    bail!(Format, "damaged: example {} was stored and is lost", hexadecimal(key));
                };
                unseal(group, members.value())?;
                unseal(&name, record.value())?;
            }
            Ok(())
        })
    }

    /// Reads z [T, K] of each example. Nothing is written unless all is there and sound.
    pub fn get(&self, plan: &Plan, keys: &[Key], latents: &mut [TensorMut]) -> Result<()> {
        self.check_plan(plan)?;
        if keys.len() != latents.len() {
            bail!(Shape, "{} keys and {} arrays of latents", keys.len(), latents.len());
        }
        for (i, z) in latents.iter().enumerate() {
            check_latents(i, z.view(), plan.num_latents())?;
        }
        let columns = columns(plan);
        let complete = self.store.read(|transaction| {
            let examples = transaction.open_table(EXAMPLES)?;
            let values = transaction.open_table(VALUES)?;
            let mut groups = Groups::new(transaction.open_table(GROUPS)?, &columns);
            let mut records = Vec::with_capacity(keys.len());
            for (i, (key, z)) in keys.iter().zip(latents.iter()).enumerate() {
                let Some(example) = Example::read(&examples, key)? else { return Ok(false) };
                check_tokens(i, z.view(), example.tokens)?;
                let mut found = 0;
                for digest in example.groups {
                    let group = groups.get(&digest)?;
                    if group.places.is_empty() {
                        continue;
                    }
                    let name = joined(key, &digest);
                    let Some(sealed) = values.get(name.as_slice())? else {
                        bail!(Format, "damaged: a record of example {} is lost", hexadecimal(key));
                    };
                    let z =
                        Header::latents(group.members).elements(unseal(&name, sealed.value())?)?;
                    if Some(z.len() as u64) != example.tokens.checked_mul(4 * group.members as u64)
                    {
                        bail!(
                            Format,
                            "damaged: a record of example {} has {} bytes",
                            hexadecimal(key),
                            z.len()
                        );
                    }
                    found += group.places.len();
                    records.push((i, digest, sealed));
                }
                if found < columns.len() {
                    return Ok(false);
                }
            }
            for (i, group, sealed) in records {
                let (z, bytes) = (&mut latents[i], record::elements(sealed.value()));
                let column = z.view().shape()[0] * 4;
                for (k, place) in &groups.get(&group)?.places {
                    write_column(z, *k, &bytes[place * column..][..column]);
                }
            }
            Ok(true)
        })?;
        if complete { Ok(()) } else { Err(self.explain_missing(plan, keys)?) }
    }

    /// Says what is not there, and what to do.
    fn explain_missing(&self, plan: &Plan, keys: &[Key]) -> Result<Error> {
        self.check_columns(plan)?;
        let missing = self.missing(plan, keys)?;
        let rows: Vec<&[bool]> = missing.chunks_exact(plan.num_latents()).collect();
        let incomplete = rows.iter().filter(|row| row.contains(&true)).count();
        let Some(first) = rows.iter().position(|row| row.contains(&true)) else {
            return Ok(self.store.name(Error::new(
                Status::CacheMiss,
                "an example was not there, and is now: read it again",
            )));
        };
        let lacks = if rows[first].contains(&false) {
            let ids = columns(plan).into_iter().zip(rows[first]).filter(|(_, absent)| **absent);
            let ids: Vec<String> = ids.map(|(column, _)| column.id.to_string()).collect();
            format!("lacks z of the latents {}", ids.join(", "))
        } else if self.knows_text(&keys[first])? {
            "is not in the cache: its token ids and positions are, with another context (images, \
             audio, token types and the like)"
                .into()
        } else {
            "is not in the cache: its token ids or positions are not those that were stored".into()
        };
        Ok(self.store.name(Error::new(
            Status::CacheMiss,
            format!(
                "example {first} (key {}) {lacks}; {incomplete} of the {} examples asked for are \
                 incomplete, {} are stored. Run the base model on them and put their z",
                hexadecimal(&keys[first]),
                keys.len(),
                self.counts()?.examples
            ),
        )))
    }

    /// Whether there is an example of these token ids and positions, of any context.
    fn knows_text(&self, key: &Key) -> Result<bool> {
        let (mut first, mut last) = (*key, *key);
        first[TEXT..].fill(0);
        last[TEXT..].fill(u8::MAX);
        self.store.read(|transaction| {
            let examples = transaction.open_table(EXAMPLES)?;
            let mut range = examples.range(first.as_slice()..=last.as_slice())?;
            Ok(range.next().transpose()?.is_some())
        })
    }

    fn check(&self, expected: &Expected) -> Result<()> {
        let found = &self.identity;
        match expected {
            Expected { base_model: Some(name), .. } if *name != found.base_model => {
                self.stale("base model", &found.base_model, name)
            }
            Expected { site: Some(site), .. } if *site != found.site => {
                self.stale("site", found.site.name(), site.name())
            }
            Expected { layer: Some(layer), .. } if Some(*layer) != found.layer => {
                let found = found.layer.map_or("none".into(), |layer| layer.to_string());
                self.stale("layer", found, layer)
            }
            Expected { dtype: Some(dtype), .. } if *dtype != found.dtype => {
                self.stale("dtype of hidden", found.dtype.name(), dtype.name())
            }
            Expected { numerics: Some(numerics), .. } if *numerics != found.numerics => {
                self.stale("numerics", &found.numerics, numerics)
            }
            _ => Ok(()),
        }
    }

    fn stale(&self, what: &str, found: impl Display, wanted: impl Display) -> Result<()> {
        Err(self.store.name(Error::new(
            Status::CacheStale,
            format!(
                "stale: it holds z for the {what} '{found}', expected '{wanted}'; open the cache \
                 that was made for it, or make a new file"
            ),
        )))
    }

    fn check_plan(&self, plan: &Plan) -> Result<()> {
        self.check(&Expected {
            site: Some(plan.site()).filter(|site| *site != Site::Unknown),
            layer: plan.layer(),
            numerics: Some(plan.numerics()),
            ..Expected::default()
        })
    }

    /// Refuses a plan of which the cache knows no latent, only others: it was made for another SAE.
    fn check_columns(&self, plan: &Plan) -> Result<()> {
        let known = self.store.read(|transaction| {
            let known = transaction.open_table(COLUMNS)?;
            if known.is_empty()? {
                return Ok(true);
            }
            for column in columns(plan) {
                if known.get(column.digest.as_slice())?.is_some() {
                    return Ok(true);
                }
            }
            Ok(false)
        })?;
        if known {
            return Ok(());
        }
        Err(self.store.name(Error::new(
            Status::CacheStale,
            format!(
                "stale: it holds z of other latents, of another SAE or for another activation, and \
                 none of this plan's {} (identity {}); open the cache that was made for it, or \
                 put its z",
                plan.num_latents(),
                plan.identity()
            ),
        )))
    }
}

const IDENTITY: &[u8] = b"identity";
/// Before the name of a note.
const NOTE: &[u8] = b"note ";

/// The version of the tables, keys and records.
const FORMAT: u64 = 2;

impl Identity {
    fn to_json(&self) -> Vec<u8> {
        let text = json!({
            "format": FORMAT,
            "base_model": self.base_model,
            "site": self.site.name(),
            "layer": self.layer,
            "dtype": self.dtype.name(),
            "numerics": self.numerics,
        });
        seal(IDENTITY, text.to_string().into_bytes())
    }

    fn from_json(text: &[u8]) -> Result<Identity> {
        let value: Value = serde_json::from_slice(text)
            .map_err(|e| Error::new(Status::Format, format!("its identity is not JSON: {e}")))?;
        if value["format"] != json!(FORMAT) {
            bail!(
                Unsupported,
                "a reference cache of format {}, and this version reads format {FORMAT}; what it \
                 holds can be computed again: make a new file (mode CREATE) and fill it",
                value["format"]
            );
        }
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let dtype = HIDDEN_DTYPES.into_iter().find(|d| value["dtype"] == d.name());
        let site = match text("site") {
            Some(name) => match Site::from_name(&name) {
                Some(site) => Some(site),
                None => bail!(
                    Unsupported,
                    "it holds z of the site '{name}', which this version does not know; use the \
                     version that filled it"
                ),
            },
            None => None,
        };
        let layer = match &value["layer"] {
            Value::Null => Some(None),
            layer => layer.as_i64().map(Some),
        };
        match (text("base_model"), site, layer, dtype, text("numerics")) {
            (Some(base_model), Some(site), Some(layer), Some(dtype), Some(numerics)) => {
                Ok(Identity { base_model, site, layer, dtype, numerics })
            }
            _ => bail!(Format, "its identity lacks base_model, site, layer, dtype or numerics"),
        }
    }

    fn digest(&self) -> Key {
        let mut hash = Sha256::new();
        let (site, dtype) = (self.site.name(), self.dtype.name());
        for text in ["blockem cache 2", &self.base_model, site, dtype, &self.numerics] {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        hash.update(self.layer.unwrap_or(-1).to_le_bytes());
        hash.finalize().into()
    }
}

const HIDDEN_DTYPES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];

/// The parts of an identity that a caller stated, checked.
#[derive(Default)]
struct Expected {
    base_model: Option<String>,
    /// Never Unknown.
    site: Option<Site>,
    layer: Option<i64>,
    dtype: Option<DType>,
    numerics: Option<String>,
}

impl Expected {
    fn new(options: &CacheOptions) -> Result<Expected> {
        if let Some(name) = options.base_model
            && (name.is_empty() || name.len() > MAX_BASE_MODEL)
        {
            bail!(
                InvalidArgument,
                "base_model has {} bytes; 1 to {MAX_BASE_MODEL} are possible: give a name with its \
                 revision, or a digest of the weights",
                name.len()
            );
        }
        if let Some(layer) = options.layer
            && layer < 0
        {
            bail!(InvalidArgument, "layer is {layer}; decoder blocks are counted from 0");
        }
        if let Some(dtype) = options.dtype
            && !HIDDEN_DTYPES.contains(&dtype)
        {
            bail!(Dtype, "hidden cannot be {}", dtype.name());
        }
        let known = |site: Site| (site != Site::Unknown).then_some(site);
        let (site, site_of_plan) =
            (known(options.site), options.plan.and_then(|p| known(p.site())));
        if let (Some(site), Some(of_plan)) = (site, site_of_plan)
            && site != of_plan
        {
            bail!(
                InvalidArgument,
                "site is {}, and the plan's SAE reads {}",
                site.name(),
                of_plan.name()
            );
        }
        if site == Some(Site::BlockInput) {
            bail!(
                InvalidArgument,
                "site is block_input: give block_output of the block before, or embedding"
            );
        }
        let layer_of_plan = options.plan.and_then(Plan::layer);
        if let (Some(layer), Some(of_plan)) = (options.layer, layer_of_plan)
            && layer != of_plan
        {
            bail!(InvalidArgument, "layer is {layer}, and the plan's SAE reads layer {of_plan}");
        }
        Ok(Expected {
            base_model: options.base_model.map(str::to_owned),
            site: site.or(site_of_plan),
            layer: options.layer.or(layer_of_plan),
            dtype: options.dtype,
            numerics: options.plan.map(Plan::numerics),
        })
    }

    /// Of a file that is to be made.
    fn identity(&self, plan: Option<&Plan>) -> Result<Identity> {
        let absent = |what: &str| {
            Error::new(Status::InvalidArgument, format!("a new cache needs {what}: state it"))
        };
        let site = match (self.site, plan.and_then(Plan::hook)) {
            (Some(site), _) => site,
            // A number alone means what leaves the block.
            (None, None) => Site::BlockOutput,
            (None, Some(hook)) => bail!(
                InvalidArgument,
                "the SAE's hook '{hook}' is not known: state the site that it reads"
            ),
        };
        let layer = match (site, self.layer) {
            (Site::Embedding, Some(layer)) => {
                bail!(InvalidArgument, "layer is {layer}, but an embedding is of no block")
            }
            (Site::Embedding, None) => None,
            // Modules outside of the blocks.
            (Site::ModuleOutput | Site::NormOutput | Site::LinearInput, layer) => layer,
            (_, None) => return Err(absent("layer, which the plan's SAE does not say")),
            (_, layer) => layer,
        };
        Ok(Identity {
            base_model: self.base_model.clone().ok_or_else(|| absent("base_model"))?,
            site,
            layer,
            dtype: self.dtype.ok_or_else(|| absent("the dtype of hidden"))?,
            numerics: self.numerics.clone().ok_or_else(|| absent("plan"))?,
        })
    }
}

/// A latent of a plan as the cache knows it.
struct Column {
    digest: Key,
    id: u64,
}

fn columns(plan: &Plan) -> Vec<Column> {
    let ids = plan.latent_ids().iter().enumerate();
    ids.map(|(k, id)| Column { digest: plan.column_digest(k), id: *id }).collect()
}

/// What is stored of an example: its length, and the records that hold its z.
struct Example {
    tokens: u64,
    groups: Vec<Key>,
}

impl Example {
    fn read(table: &impl Table, key: &Key) -> Result<Option<Example>> {
        let Some(sealed) = table.get(key.as_slice())? else { return Ok(None) };
        let record = unseal(key, sealed.value())?;
        let Some((tokens, Some(groups))) =
            record.split_first_chunk().map(|(tokens, rest)| (tokens, digests(rest)))
        else {
            bail!(Format, "damaged: example {} has no length or half a group", hexadecimal(key));
        };
        Ok(Some(Example { tokens: u64::from_le_bytes(*tokens), groups: groups.to_vec() }))
    }

    fn to_record(&self, key: &Key) -> Vec<u8> {
        seal(
            key,
            self.tokens.to_le_bytes().into_iter().chain(self.groups.iter().copied().flatten()),
        )
    }
}

/// Latents whose columns stand in one record.
struct Group {
    /// Columns of the record.
    members: usize,
    /// The plan's column, and its place in the record.
    places: Vec<(usize, usize)>,
}

impl Group {
    fn read(table: &impl Table, digest: &Key, columns: &[Column]) -> Result<Group> {
        let Some(sealed) = table.get(digest.as_slice())? else {
            bail!(Format, "damaged: the latents of a record are lost");
        };
        let Some(members) = digests(Kind::Latents.body(unseal(digest, sealed.value())?)?) else {
            bail!(Format, "damaged: the latents of a record are cut short");
        };
        let place = |column: &Column| members.iter().position(|m| *m == column.digest);
        let places = columns.iter().enumerate().filter_map(|(k, c)| Some((k, place(c)?))).collect();
        Ok(Group { members: members.len(), places })
    }
}

/// Digests that follow each other; None where the last is cut.
fn digests(bytes: &[u8]) -> Option<&[Key]> {
    let (digests, rest) = bytes.as_chunks();
    rest.is_empty().then_some(digests)
}

/// The groups that a call has met.
struct Groups<'a, T> {
    table: T,
    columns: &'a [Column],
    met: HashMap<Key, Group>,
}

impl<'a, T: Table> Groups<'a, T> {
    fn new(table: T, columns: &'a [Column]) -> Groups<'a, T> {
        Groups { table, columns, met: HashMap::new() }
    }

    fn get(&mut self, digest: &Key) -> Result<&Group> {
        if !self.met.contains_key(digest) {
            self.met.insert(*digest, Group::read(&self.table, digest, self.columns)?);
        }
        Ok(&self.met[digest])
    }
}

/// A table of records by digest.
trait Table: ReadableTable<&'static [u8], &'static [u8]> {}
impl<T: ReadableTable<&'static [u8], &'static [u8]>> Table for T {}

fn check_tokens(example: usize, latents: &Tensor, stored: u64) -> Result<()> {
    if latents.shape()[0] as u64 != stored {
        bail!(
            Shape,
            "latents[{example}] has {} tokens, the example has {stored} in the cache",
            latents.shape()[0]
        );
    }
    Ok(())
}

fn check_latents(example: usize, latents: &Tensor, num_latents: usize) -> Result<()> {
    if latents.device != Device::Cpu {
        bail!(DeviceMismatch, "latents[{example}] is not in host memory, where a cache reads");
    }
    if latents.dtype != DType::F32 {
        bail!(Dtype, "latents[{example}] is {}; expected float32", latents.dtype.name());
    }
    match latents.shape() {
        [0, _] => bail!(Shape, "latents[{example}] has no tokens; an example has at least one"),
        [_, k] if *k == num_latents => Ok(()),
        shape => {
            bail!(Shape, "latents[{example}] has the shape {shape:?}; expected [T, {num_latents}]")
        }
    }
}

/// A reference that is not finite would reach the loss of every later step.
fn check_finite(example: usize, latents: &Tensor) -> Result<()> {
    for t in 0..latents.shape()[0] {
        for k in 0..latents.shape()[1] {
            let z = element(latents, t, k);
            if !z.is_finite() {
                bail!(
                    NonFinite,
                    "latents[{example}] is {z} at token {t}, column {k}: the base model's hidden \
                     states overflow there"
                );
            }
        }
    }
    Ok(())
}

fn element(latents: &Tensor, t: usize, k: usize) -> f32 {
    let at = t * latents.stride()[0] + k * latents.stride()[1];
    // SAFETY: `check_latents` saw host f32 [T, K], and t < T, k < K.
    unsafe { latents.data.cast::<f32>().add(at).read_unaligned() }
}

/// bytes: the T little-endian f32 of column k.
fn write_column(latents: &mut TensorMut, k: usize, bytes: &[u8]) {
    let (step, column) = (latents.view().stride()[0], k * latents.view().stride()[1]);
    let to = latents.data_mut().cast::<f32>();
    for (t, z) in bytes.chunks_exact(4).enumerate() {
        let z = f32::from_le_bytes([z[0], z[1], z[2], z[3]]);
        // SAFETY: `check_latents` saw host f32 [T, K]; the record was checked to hold T elements.
        unsafe { to.add(t * step + column).write_unaligned(z) };
    }
}

/// The key of a note in its table.
fn note_key(name: &str) -> Result<Vec<u8>> {
    if name.is_empty() || name.len() > MAX_NOTE_NAME {
        bail!(
            InvalidArgument,
            "the name of a note has {} bytes; 1 to {MAX_NOTE_NAME} are possible",
            name.len()
        );
    }
    Ok([NOTE, name.as_bytes()].concat())
}

fn hexadecimal(key: &Key) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}
