//! Sites: the places of a model at which hidden states are read, and written to by steering.

use crate::error::{Result, bail};

use super::config::Config;
use super::hook::Hook;

/// Where in a model an SAE reads. The numbers are those of the C header and never change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum Site {
    /// Nothing says it, or says it in words that are not known.
    #[default]
    Unknown = 0,
    /// The residual stream that enters the block.
    BlockInput = 1,
    /// The residual stream that leaves the block.
    BlockOutput = 2,
    /// What the attention adds to the residual stream, after a norm of its own where it has one.
    AttentionOutput = 3,
    /// What the MLP adds to the residual stream, after a norm of its own where it has one.
    MlpOutput = 4,
    /// The heads' values, concatenated, before the output projection.
    AttentionZ = 5,
    /// The tokens' embeddings, as block 0 reads them.
    Embedding = 6,
    /// The residual stream between the attention and the MLP.
    BlockMiddle = 7,
    /// What the MLP reads, after its norm.
    MlpInput = 8,
    /// The output of a module that is none of the others; the hook is its name in Hugging Face.
    ModuleOutput = 9,
    /// What the attention reads, after its norm.
    AttentionInput = 10,
    /// The attention's keys, before rotation.
    Keys = 11,
    /// The attention's values.
    Values = 12,
    /// What a norm makes of its input before its own weight and bias (`hook_normalized`).
    NormOutput = 13,
    /// What a linear layer reads.
    LinearInput = 14,
}

impl Site {
    pub const ALL: [Site; 15] = {
        use Site::*;
        [
            Unknown,
            BlockInput,
            BlockOutput,
            AttentionOutput,
            MlpOutput,
            AttentionZ,
            Embedding,
            BlockMiddle,
            MlpInput,
            ModuleOutput,
            AttentionInput,
            Keys,
            Values,
            NormOutput,
            LinearInput,
        ]
    };

    pub fn from_name(name: &str) -> Option<Site> {
        Site::ALL.into_iter().find(|site| site.name() == name)
    }

    /// The name in recipes and converted files.
    pub fn name(self) -> &'static str {
        match self {
            Site::Unknown => "unknown",
            Site::BlockInput => "block_input",
            Site::BlockOutput => "block_output",
            Site::AttentionOutput => "attention_output",
            Site::MlpOutput => "mlp_output",
            Site::AttentionZ => "attention_z",
            Site::Embedding => "embedding",
            Site::BlockMiddle => "block_middle",
            Site::MlpInput => "mlp_input",
            Site::ModuleOutput => "module_output",
            Site::AttentionInput => "attention_input",
            Site::Keys => "keys",
            Site::Values => "values",
            Site::NormOutput => "norm_output",
            Site::LinearInput => "linear_input",
        }
    }

    /// Whether it is the residual stream between two blocks, before the first, or after the last.
    pub fn is_boundary(self) -> bool {
        matches!(self, Site::BlockInput | Site::BlockOutput | Site::Embedding)
    }
}

/// A site and its block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub site: Site,
    /// 0-based decoder block.
    pub layer: Option<i64>,
    /// Index into Hugging Face's `hidden_states`, of block boundaries.
    pub hidden_states_index: Option<i64>,
}

impl Place {
    /// A site of a block. What enters block l is what leaves block l − 1, or the embedding.
    pub fn new(site: Site, block: Option<i64>) -> Place {
        let (site, layer) = match (site, block) {
            (Site::BlockInput, Some(block)) if block <= 0 => (Site::Embedding, None),
            (Site::BlockInput, Some(block)) => (Site::BlockOutput, Some(block - 1)),
            (Site::Embedding, _) => (Site::Embedding, None),
            other => other,
        };
        let hidden_states_index = match site {
            Site::BlockOutput => layer.map(|layer| layer + 1),
            Site::Embedding => Some(0),
            _ => None,
        };
        Place { site, layer, hidden_states_index }
    }

    /// What a module that embeds tokens puts out: block 0's input, unless the model goes on to add
    /// positions or to scale, which the name alone does not tell.
    pub fn token_embedding() -> Place {
        Place { site: Site::Embedding, layer: None, hidden_states_index: None }
    }

    /// Whether both are the same site of the same block.
    pub fn is(self, other: Place) -> bool {
        (self.site, self.layer) == (other.site, other.layer)
    }
}

/// What a file with its folders, or the options, say about where an SAE reads.
#[derive(Clone, Debug, Default)]
pub(super) struct Stated {
    pub hook: Option<String>,
    /// Of files without a hook, and of converted ones.
    pub site: Option<Site>,
    /// Of the same.
    pub layer: Option<i64>,
    /// SAELens' `hf_hook_name`: the exact module.
    pub module: Option<String>,
    /// SAELens' `hook_layer`: the block in which the hook lies.
    pub block: Option<i64>,
}

impl Stated {
    /// SAELens' keys and those of converted files.
    pub fn read(config: &Config) -> Result<Stated> {
        let text = |key| Ok(config.text(key)?.map(str::to_string));
        let block = |key| Ok(config.count(key)?.and_then(|n| i64::try_from(n).ok()));
        Ok(Stated {
            hook: first([text("hook_name"), text("hook_point")])?,
            site: site(config)?,
            layer: block("layer")?,
            module: text("hf_hook_name")?,
            block: first([block("hook_layer"), block("hook_point_layer")])?,
        })
    }

    /// The hook's name and the place, where the options complete or override the file.
    pub fn resolve(self, config: &Config) -> Result<(Option<String>, Place)> {
        let given = Stated::read(&config.options_alone())?;
        if given.hook.is_some() || given.module.is_some() {
            return given.place("the options' recipe");
        }
        let (hook, own) = self.place(config.origin())?;
        if given.site.is_none() && given.layer.is_none() {
            return Ok((hook, own));
        }
        let place = Place::new(given.site.unwrap_or(own.site), given.layer.or(own.layer));
        if place.site == Site::Embedding && given.layer.is_some_and(|layer| layer != 0) {
            bail!(
                InvalidArgument,
                "{}: the options' recipe states a layer, but the site is embedding, which is of no \
                 block; state the site too",
                config.origin()
            );
        }
        // A name of another place than the options say would mislead.
        let named = hook.as_deref().map(Hook::parse).unwrap_or_default().place;
        let fits = named.site == Site::Unknown || named.is(place);
        Ok((hook.filter(|_| fits), place))
    }

    /// The hook's name and the place, which must not contradict each other.
    fn place(self, origin: &str) -> Result<(Option<String>, Place)> {
        let mut hook = self.hook;
        let mut named = hook.as_deref().map(Hook::parse).unwrap_or_default();
        if let Some(module) = self.module {
            let exact = Hook::parse(&module);
            let apart = exact.block.zip(named.block).is_some_and(|(a, b)| a != b);
            if apart {
                return contradiction(origin, hook, &format!("hf_hook_name is {module}"));
            }
            if exact.place.site != Site::Unknown && !exact.place.is(named.place) {
                (hook, named) = (Some(module), exact);
            }
        }
        if named.place.site == Site::Unknown {
            let block = self.layer.or(self.block);
            return Ok((hook, Place::new(self.site.unwrap_or_default(), block)));
        }
        let place = named.place;
        if let Some(block) = self.block.filter(|block| named.block.is_some_and(|n| n != *block)) {
            return contradiction(origin, hook, &format!("hook_layer is {block}"));
        }
        if let Some(site) =
            self.site.filter(|site| !place.is(Place::new(*site, self.layer.or(place.layer))))
        {
            return contradiction(origin, hook, &format!("site is {}", site.name()));
        }
        if let Some(layer) = self.layer.filter(|layer| place.layer != Some(*layer)) {
            return contradiction(origin, hook, &format!("layer is {layer}"));
        }
        Ok((hook, place))
    }
}

fn first<T>(found: [Result<Option<T>>; 2]) -> Result<Option<T>> {
    let [a, b] = found;
    Ok(a?.or(b?))
}

fn contradiction<T>(origin: &str, hook: Option<String>, other: &str) -> Result<T> {
    bail!(
        Format,
        "{origin}: the hook is {}, but the key {other}; correct one of them, or state hook_name in \
         the options' recipe",
        hook.unwrap_or_default()
    )
}

/// The key `site`.
fn site(config: &Config) -> Result<Option<Site>> {
    let Some(name) = config.text("site")? else { return Ok(None) };
    match Site::from_name(name) {
        Some(site) => Ok(Some(site)),
        None => bail!(
            Format,
            "{}: the key site is {name}; known are {}",
            config.origin(),
            Site::ALL.map(Site::name).join(", ")
        ),
    }
}
