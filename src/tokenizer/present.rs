//! tokenizer.json by the tokenizers crate.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::utils::parallelism;
use tokenizers::{
    DecoderWrapper, Encoding, ModelWrapper, NormalizerWrapper, PostProcessor, PostProcessorWrapper,
    PreTokenizerWrapper, TokenizerImpl,
};

use super::{Masked, TokenOptions};
use crate::error::{Error, Result, Status, bail, panic_text};
use crate::json;
use crate::mask::{MaskOptions, Span, check_length, mask_from_offsets};

/// The largest tokenizer.json. Those of large vocabularies have 35 MB, and take thirty times as much
/// memory for a moment.
const MAX_FILE: u64 = 64 << 20;
/// The most tokens that a tokenizer may put around a text.
const MAX_ADDED: usize = 1024;
/// How often the parts of a regular expression may be repeated by counts, such as `\p{N}{1,3}`, in
/// all: each repetition is compiled by itself.
const MAX_REPEATS: u64 = 100_000;

/// A tokenizer. Immutable; any thread may use it.
pub struct Tokenizer {
    /// Without the post-processor, which may cut white space from offsets.
    bare: TokenizerImpl<
        ModelWrapper,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >,
    post_processor: Option<PostProcessorWrapper>,
    /// Added tokens that take the white space beside them, with their own text.
    greedy: HashMap<u32, String>,
}

/// The tokens of a text, with the bytes that each stands for; an added one stands for none.
struct Tokens {
    ids: Vec<u32>,
    offsets: Vec<Span>,
}

impl Tokenizer {
    /// A tokenizer.json, or a folder with one.
    pub fn open(path: impl AsRef<Path>) -> Result<Tokenizer> {
        let path = path.as_ref();
        let path = if path.is_dir() { file_of(path)? } else { path.to_path_buf() };
        let failed = |e: &std::io::Error| Error::io(&path, "read", e);
        let file = File::open(&path).map_err(|e| failed(&e))?;
        let mut bytes = Vec::new();
        // One byte more tells a file that is too large, also one that has no length.
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| failed(&e))?;
        let name = path.file_name().and_then(|name| name.to_str()).and_then(remedy);
        let hint = name.map(|remedy| format!("; {remedy}")).unwrap_or_default();
        let named =
            |e: Error| Error::new(e.status, format!("{}: {}{hint}", path.display(), e.message));
        Tokenizer::from_json(&bytes).map_err(named)
    }

    /// The contents of a tokenizer.json.
    pub fn from_json(json: &[u8]) -> Result<Tokenizer> {
        if json.len() as u64 > MAX_FILE {
            bail!(Format, "more than {MAX_FILE} bytes: no tokenizer.json is that large");
        }
        // The crate asks the environment otherwise, and starts threads.
        parallelism::set_parallelism(false);
        caught("opening it", || Tokenizer::build(json))
    }

    fn build(text: &[u8]) -> Result<Tokenizer> {
        let outline: Outline = json::parse(text).map_err(not_a_tokenizer)?;
        outline.check_repeats()?;
        let whole: tokenizers::Tokenizer = json::parse(text).map_err(not_a_tokenizer)?;
        for added in &outline.added_tokens {
            // The crate would go on with another id.
            if whole.token_to_id(&added.content).is_some_and(|id| id != added.id) {
                bail!(
                    Format,
                    "the added token {:?} has the id {}, but the vocabulary gives it {}",
                    added.content,
                    added.id,
                    whole.token_to_id(&added.content).unwrap_or_default()
                );
            }
        }
        let greedy = whole.get_added_tokens_decoder().into_iter();
        let greedy = greedy.filter(|(_, token)| token.lstrip || token.rstrip);
        let greedy = greedy.map(|(id, token)| (id, token.content)).collect();
        let post_processor = whole.get_post_processor().cloned();
        let added = post_processor.as_ref().map_or(0, |post| post.added_tokens(false));
        if added > MAX_ADDED {
            bail!(Format, "it puts {added} tokens around a text; at most {MAX_ADDED}");
        }
        let mut bare = whole.into_inner();
        bare.with_post_processor(None::<PostProcessorWrapper>).with_padding(None);
        bare.with_truncation(None).map_err(|e| Error::new(Status::Format, e.to_string()))?;
        Ok(Tokenizer { bare, post_processor, greedy })
    }

    /// The tokens of a text, and which are the assistant's.
    pub fn mask(&self, text: &str, options: &MaskOptions, tokens: TokenOptions) -> Result<Masked> {
        let tokens = caught("tokenizing a text", || self.tokens(text, tokens))?;
        let mask = mask_from_offsets(text, options, &tokens.offsets)?;
        Ok(Masked { ids: tokens.ids.into_iter().map(i64::from).collect(), mask })
    }

    /// The mask of tokens that a trainer made of the text, which must be those of [`Self::mask`].
    pub fn mask_ids(
        &self,
        text: &str,
        options: &MaskOptions,
        tokens: TokenOptions,
        ids: &[i64],
    ) -> Result<Vec<u8>> {
        let tokens = caught("tokenizing a text", || self.tokens(text, tokens))?;
        expect_same(text, &tokens, ids)?;
        mask_from_offsets(text, options, &tokens.offsets)
    }

    fn tokens(&self, text: &str, options: TokenOptions) -> Result<Tokens> {
        check_length(text)?;
        let failed = |e: tokenizers::Error| {
            Error::new(Status::Format, format!("the tokenizer cannot take the text: {e}"))
        };
        let mut encoding = self.bare.encode(text, false).map_err(failed)?;
        let post = self.post_processor.as_ref().filter(|_| options.add_special_tokens);
        let added = post.map_or(0, |post| post.added_tokens(false));
        if let Some(most) = options.max_tokens {
            if most < added {
                bail!(InvalidArgument, "max_tokens is {most}, and {added} tokens are added alone");
            }
            let kept = most - added;
            if encoding.len() > kept {
                encoding = prefix(encoding, kept);
            }
        }
        let inner = self.spanned(text, &encoding);
        match post {
            None => Ok(inner),
            Some(post) => surrounded(inner, post.process(encoding, None, true).map_err(failed)?),
        }
    }

    fn spanned(&self, text: &str, encoding: &Encoding) -> Tokens {
        let pairs = encoding.get_ids().iter().zip(encoding.get_offsets());
        let offsets = pairs.map(|(id, &(start, end))| {
            let own = self.greedy.get(id).and_then(|own| {
                let at = start + text.get(start..end)?.find(own.as_str())?;
                Some(at..at + own.len())
            });
            own.unwrap_or(start..end)
        });
        Tokens { offsets: offsets.collect(), ids: encoding.get_ids().to_vec() }
    }
}

/// The first tokens of an encoding, as if the rest had never been.
fn prefix(encoding: Encoding, kept: usize) -> Encoding {
    Encoding::new(
        encoding.get_ids()[..kept].to_vec(),
        encoding.get_type_ids()[..kept].to_vec(),
        encoding.get_tokens()[..kept].to_vec(),
        encoding.get_word_ids()[..kept].to_vec(),
        encoding.get_offsets()[..kept].to_vec(),
        encoding.get_special_tokens_mask()[..kept].to_vec(),
        encoding.get_attention_mask()[..kept].to_vec(),
        Vec::new(),
        Default::default(),
    )
}

/// Tokens with what the post-processor put around them.
fn surrounded(inner: Tokens, whole: Encoding) -> Result<Tokens> {
    let (ids, special) = (whole.get_ids().to_vec(), whole.get_special_tokens_mask());
    let start = special.iter().position(|special| *special == 0).unwrap_or(0);
    let place = start..start + inner.ids.len();
    let kept = special.iter().filter(|special| **special == 0).count();
    if kept != inner.ids.len() || ids.get(place.clone()) != Some(&inner.ids[..]) {
        bail!(
            Unsupported,
            "the post-processor does not put tokens around the text but changes it; leave \
             add_special_tokens out"
        );
    }
    let mut offsets = vec![0..0; ids.len()];
    offsets[place].clone_from_slice(&inner.offsets);
    Ok(Tokens { ids, offsets })
}

fn expect_same(text: &str, ours: &Tokens, theirs: &[i64]) -> Result<()> {
    let same = |(a, b): (&u32, &i64)| i64::from(*a) == *b;
    let at = ours.ids.iter().zip(theirs).position(|pair| !same(pair));
    if let Some(at) = at {
        let offset = &ours.offsets[at];
        bail!(
            MaskUnaligned,
            "the token ids are not those of the text: at position {at} stands {}, and the text has \
             {} there ({:?} at bytes {}..{}); give the text, the tokenizer and add_special_tokens \
             of the ids",
            theirs[at],
            ours.ids[at],
            text.get(offset.clone()).unwrap_or_default(),
            offset.start,
            offset.end
        );
    }
    let (m, n) = (ours.ids.len(), theirs.len());
    if m != n {
        bail!(
            MaskUnaligned,
            "the token ids are not those of the text: there are {n}, the text has {m}, and they \
             are the same up to position {}; give max_tokens where they were cut, and leave \
             padding out",
            m.min(n)
        );
    }
    Ok(())
}

/// What is looked at before the crate builds anything.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

impl Outline {
    /// A regular expression of a few bytes can ask for gigabytes.
    fn check_repeats(&self) -> Result<()> {
        let mut left = vec![&self.normalizer, &self.pre_tokenizer, &self.decoder];
        while let Some(value) = left.pop() {
            match value {
                Value::Array(values) => left.extend(values),
                Value::Object(fields) => {
                    left.extend(fields.values());
                    if let Some(Value::String(pattern)) = fields.get("Regex")
                        && repeats(pattern) > MAX_REPEATS
                    {
                        bail!(Format, "the regular expression {pattern:.200?} repeats too often");
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The product of all counts in braces: no part is repeated more often.
fn repeats(pattern: &str) -> u64 {
    let counts = pattern.split('{').skip(1).filter_map(|rest| {
        let numbers = rest.split('}').next()?.split(',').map(str::trim);
        numbers.filter_map(|n| n.parse::<u64>().ok()).max()
    });
    counts.fold(1, |product, count| product.saturating_mul(count.max(1)))
}

fn not_a_tokenizer(reason: String) -> Error {
    Error::new(Status::Format, format!("not a tokenizer.json: {reason}"))
}

/// What to do with a tokenizer that lies in another file than tokenizer.json.
fn remedy(file: &str) -> Option<String> {
    let kind = match file {
        "tokenizer.model" => "a model of SentencePiece or tiktoken",
        "tekken.json" => "Mistral's own vocabulary",
        "vocab.json" | "merges.txt" | "vocab.txt" => "a vocabulary without its rules",
        _ => return None,
    };
    Some(format!(
        "{file} is {kind}, which is not read: write a tokenizer.json beside it, in Python by \
         transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    ))
}

/// A folder's tokenizer.json.
fn file_of(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("tokenizer.json");
    if path.is_file() {
        return Ok(path);
    }
    let mut held: Vec<String> = std::fs::read_dir(folder)
        .map_err(|e| Error::io(folder, "list the folder", &e))?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    held.sort();
    let place = folder.display();
    match held.iter().find_map(|file| remedy(file)) {
        Some(remedy) => bail!(Format, "{place}: tokenizer.json is missing; {remedy}"),
        None => bail!(
            Io,
            "{place}: tokenizer.json is missing; the folder holds {}",
            if held.is_empty() { "nothing".to_string() } else { held.join(", ") }
        ),
    }
}

/// The crate panics on some files and texts.
fn caught<T>(what: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        bail!(Format, "the tokenizers crate panicked in {what}: {}", panic_text(&*panic))
    })
}
