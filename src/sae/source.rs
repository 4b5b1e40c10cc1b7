//! What lies under a path: the weights, the configurations beside them, what the caller knows.

use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result, bail};

use super::SaeOptions;
use super::array::{Array, Layout, Matrix};
use super::config::Config;
use super::container::Container;
use super::found::scalar;

/// The weights of a folder, by the names that owners give them, the surest first.
const WEIGHTS: [&str; 9] = [
    "sae_weights.safetensors",
    "sae.safetensors",
    "params.safetensors",
    "params.npz",
    "ae.pt",
    "checkpoints/final.safetensors",
    "checkpoints/pruned.safetensors",
    "sae_weights.pt",
    "model.safetensors",
];
const CONFIGS: [&str; 4] = ["cfg.json", "config.json", "hyperparams.json", "config.yaml"];

/// A file of weights with what is known of it.
pub(super) struct Source<'a> {
    pub container: Container,
    pub options: &'a SaeOptions,
    weights: PathBuf,
    /// From the root on, as the caller named it.
    absolute: PathBuf,
    /// The names of the file and its folders, the nearest first: as the caller gave them, which
    /// count first; then those that its folder, and it itself, have behind links.
    named: Vec<Vec<String>>,
}

impl<'a> Source<'a> {
    pub fn find(path: &Path, options: &'a SaeOptions) -> Result<Source<'a>> {
        let weights = weights_of(path)?;
        let container = Container::open(&weights)?.unwrapped()?;
        let absolute = std::path::absolute(&weights).unwrap_or_else(|_| weights.clone());
        let named = named(&absolute);
        Ok(Source { container, options, weights, absolute, named })
    }

    pub fn weights(&self) -> &Path {
        &self.weights
    }

    /// The caller's word for the format.
    pub fn given_format(&self) -> Option<&str> {
        self.options.recipe.as_ref()?.get("format")?.as_str()
    }

    /// A configuration beside the weights (or above a folder `checkpoints`) under the caller's keys.
    pub fn config(&self, name: &str) -> Result<Option<Config>> {
        let Some(path) = self.beside(name) else { return Ok(None) };
        Config::read(&path, self.options.recipe.as_ref()).map(Some)
    }

    /// The caller's keys alone.
    pub fn options_config(&self) -> Config {
        let origin = format!("{}: the options' recipe", self.weights.display());
        Config::new(origin, Map::new(), self.options.recipe.as_ref())
    }

    /// The configuration of that name, else the caller's keys alone.
    pub fn config_or_options(&self, name: &str) -> Result<Config> {
        Ok(self.config(name)?.unwrap_or_else(|| self.options_config()))
    }

    /// A file of this name beside the weights.
    pub fn beside(&self, name: &str) -> Option<PathBuf> {
        let folder = self.absolute.parent()?;
        let above = folder.ends_with("checkpoints").then(|| folder.parent()).flatten();
        [Some(folder), above].into_iter().flatten().map(|f| f.join(name)).find(|p| p.is_file())
    }

    /// The number behind one of these words in the names of the file and its folders, such as 19 in
    /// `…-l19.pth` or `layer_19/width_16k`.
    pub fn layer_in_path(&self, words: &[&str]) -> Option<i64> {
        let mut names = self.names(5).map(|name| name.to_lowercase());
        names.find_map(|name| words.iter().find_map(|word| number_after(&name, word)))
    }

    /// The names of the folders that hold the file, the nearest first: as deep as owners lay them
    /// out, below Hugging Face's `models--owner--name/snapshots/revision`.
    pub fn folders(&self) -> impl Iterator<Item = &str> {
        self.named.iter().flat_map(|names| names.iter().skip(1).take(8).map(String::as_str))
    }

    /// The name of the folder that holds the file, and those that links give it.
    pub fn folder(&self) -> impl Iterator<Item = &str> {
        self.named.iter().filter_map(|names| names.get(1).map(String::as_str))
    }

    /// The names of the file and of the folders that hold it, the nearest first.
    fn names(&self, depth: usize) -> impl Iterator<Item = &str> {
        self.named.iter().flat_map(move |names| names.iter().take(depth).map(String::as_str))
    }

    /// The one number of a tensor, or a number beside the tensors.
    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        match self.container.find(name)? {
            Some(tensor) => scalar(&tensor).map(Some),
            None => Ok(self.container.value(name).and_then(Value::as_f64)),
        }
    }

    /// An encoder that the owner keeps as [d_sae, d_in], as every linear layer of PyTorch does.
    pub fn linear(&self, name: &str) -> Result<Matrix> {
        matrix(self.container.need(name)?, Layout::LatentMajor)
    }

    /// A matrix of which the bias's length tells which axis counts latents; a square one lies as the
    /// caller or `owner` says.
    pub fn oriented(&self, name: &str, bias: &Array, owner: Option<Layout>) -> Result<Matrix> {
        let array = self.container.need(name)?;
        let (&[a, b], &[n]) = (array.shape(), bias.shape()) else {
            let text = format!(
                "has the shape {:?} and its bias {:?}; expected two dimensions and one",
                array.shape(),
                bias.shape()
            );
            return Err(array.fault(crate::error::Status::Shape, text));
        };
        let config = self.options_config();
        let stated = config.text("layout")?.and_then(Layout::from_name);
        let layout = match (a == n, b == n) {
            (true, false) => Layout::LatentMajor,
            (false, true) => Layout::InputMajor,
            (true, true) => match stated.or(owner) {
                Some(layout) => layout,
                None => {
                    return config.missing(
                        "layout",
                        "the encoder is square, so its shape does not tell which axis is which: \
                         state latent_major (a row per latent) or input_major",
                    );
                }
            },
            (false, false) => {
                let text = format!("has the shape {:?}, which fits no bias of {n}", array.shape());
                return Err(array.fault(crate::error::Status::Shape, text));
            }
        };
        matrix(array, layout)
    }

    /// A decoder of the encoder's own inputs; a transcoder's has others and is left out.
    pub fn same_width_decoder(
        &self,
        name: &str,
        w_enc: &Matrix,
        owner: Layout,
    ) -> Result<Option<Matrix>> {
        let (latents, inputs) = (w_enc.latents(), w_enc.inputs());
        let fits = self.container.shape(name).is_some_and(|shape| {
            shape == [latents, inputs].as_slice() || shape == [inputs, latents].as_slice()
        });
        if fits { self.decoder(name, w_enc, owner) } else { Ok(None) }
    }

    /// A decoder, which lies as its shape beside the encoder's says; `owner` where both ways fit.
    pub fn decoder(&self, name: &str, w_enc: &Matrix, owner: Layout) -> Result<Option<Matrix>> {
        let Some(array) = self.container.find(name)? else { return Ok(None) };
        let (latents, inputs) = (w_enc.latents(), w_enc.inputs());
        let layout = match array.shape() {
            _ if latents == inputs => owner,
            shape if shape == Layout::InputMajor.shape(latents, inputs) => Layout::InputMajor,
            _ => Layout::LatentMajor,
        };
        matrix(array, layout).map(Some)
    }
}

/// Two dimensions of which `layout` says which is which.
pub(super) fn matrix(array: Array, layout: Layout) -> Result<Matrix> {
    if array.shape().len() != 2 {
        let text = format!("has the shape {:?}; expected two dimensions", array.shape());
        return Err(array.fault(crate::error::Status::Shape, text));
    }
    Ok(Matrix::new(array, layout))
}

/// What a file is called. Links keep the names that the caller gave: Hugging Face's cache has the
/// owner's names on links to files that are named after their hashes. Only where those say nothing
/// do the names behind links count: of the folder, then of the file.
fn named(absolute: &Path) -> Vec<Vec<String>> {
    let target = absolute.canonicalize().ok();
    let folder = absolute.parent().and_then(|folder| folder.canonicalize().ok());
    let resolved = folder.zip(absolute.file_name()).map(|(folder, file)| folder.join(file));
    // Behind a link, what is above `..` is not what the caller wrote before it.
    let climbs = absolute.components().any(|part| part == Component::ParentDir);
    let given = (!climbs).then(|| absolute.to_path_buf());
    let mut named: Vec<Vec<String>> = Vec::new();
    for path in [given, resolved, target].into_iter().flatten() {
        let names = names_of(&path);
        if !named.contains(&names) {
            named.push(names);
        }
    }
    named
}

fn names_of(path: &Path) -> Vec<String> {
    let names = path.components().rev().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
        _ => None,
    });
    names.collect()
}

/// The file of weights that a path means.
fn weights_of(path: &Path) -> Result<PathBuf> {
    let is_config = path.file_name().is_some_and(|name| CONFIGS.iter().any(|c| name == *c));
    let folder = match path.parent() {
        _ if path.is_dir() => path,
        Some(folder) if is_config && folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) if is_config => folder,
        _ => return Ok(path.to_path_buf()),
    };
    if let Some(known) = WEIGHTS.iter().map(|name| folder.join(name)).find(|p| p.is_file()) {
        return Ok(known);
    }
    let mut held: Vec<PathBuf> = std::fs::read_dir(folder)
        .map_err(|e| Error::io(folder, "list the folder", &e))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    held.sort();
    let of_weights = |path: &&PathBuf| {
        let extension = path.extension().and_then(|e| e.to_str()).map(str::to_lowercase);
        extension.is_some_and(|e| {
            matches!(&e[..], "safetensors" | "npz" | "pt" | "pth" | "bin" | "ckpt")
        })
    };
    let name_of =
        |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let indexes: Vec<&PathBuf> =
        held.iter().filter(|path| name_of(path).ends_with(".index.json")).collect();
    let found: Vec<&PathBuf> = match indexes[..] {
        [] => held.iter().filter(of_weights).collect(),
        _ => indexes,
    };
    let names = |paths: &[&PathBuf]| {
        let names =
            paths.iter().filter_map(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
        names.collect::<Vec<_>>().join(", ")
    };
    let distributed = held.iter().find(|path| path.extension().is_some_and(|e| e == "dcp"));
    match found[..] {
        [only] => Ok(only.clone()),
        [] if distributed.is_some() => bail!(
            Unsupported,
            "{}: {} is a distributed checkpoint of PyTorch, which is not read; load it with its \
             owner's library and save it as safetensors",
            folder.display(),
            names(&distributed.into_iter().collect::<Vec<_>>())
        ),
        [] => bail!(
            Io,
            "{}: sae_weights.safetensors is missing, and nothing else here is a file of weights: \
             the folder holds {}. Give the SAE's folder or its file",
            folder.display(),
            if held.is_empty() {
                "nothing".into()
            } else {
                names(&held.iter().collect::<Vec<_>>())
            }
        ),
        [..] if found.iter().any(|path| is_shard(&name_of(path))) => {
            let shards: Vec<&PathBuf> =
                found.into_iter().filter(|path| is_shard(&name_of(path))).collect();
            bail!(
                Io,
                "{}: {} are files of one model, whose index (such as \
                 model.safetensors.index.json) is missing; fetch it too",
                folder.display(),
                names(&shards)
            )
        }
        _ => bail!(
            InvalidArgument,
            "{}: several files may be the SAE: {}; give one of them",
            folder.display(),
            names(&found)
        ),
    }
}

/// `model-00001-of-00003.safetensors`
fn is_shard(name: &str) -> bool {
    let count = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    name.rsplit_once("-of-").is_some_and(|(before, after)| {
        before.rsplit_once('-').is_some_and(|(_, n)| count(n))
            && after.split_once('.').is_some_and(|(n, _)| count(n))
    })
}

/// The digits that follow a word, where nothing but the word's own separator comes before it.
pub(super) fn number_after(text: &str, word: &str) -> Option<i64> {
    text.match_indices(word).find_map(|(at, _)| {
        let before = text[..at].chars().next_back();
        let digits: String =
            text[at + word.len()..].chars().take_while(char::is_ascii_digit).collect();
        let apart = before.is_none_or(|c| !c.is_ascii_alphanumeric());
        if apart { digits.parse::<u32>().ok().map(i64::from) } else { None }
    })
}
