//! Names of hooks and modules: TransformerLens 2 and 3 (`blocks.5.hook_resid_post`,
//! `blocks.5.hook_out`), Hugging Face and sparsify (`model.layers.5.mlp`), nnsight
//! (`model.layers[5].mlp.output[0]`), dictionary_learning (`mlp_out_layer_5`).
//!
//! A name that may mean two places of two models, such as `post_attention_layernorm` (before the MLP
//! in Llama, after the attention in Gemma), is that module's output and nothing else.

use super::site::{Place, Site};

/// What a name means; the default where it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Hook {
    pub place: Place,
    /// The block that the name says: one more than the place's where it reads a block's input.
    pub block: Option<i64>,
}

/// Lists of decoder blocks.
const STACKS: [&str; 5] = ["layers", "h", "blocks", "block", "layer"];
/// What may hold them, and wrappers around models.
const HOLDERS: [&str; 12] = [
    "model",
    "language_model",
    "text_model",
    "transformer",
    "gpt_neox",
    "decoder",
    "backbone",
    "rwkv",
    "llm",
    "base_model",
    "module",
    "_orig_mod",
];
/// Other parts of models, whose modules may be named too.
const TOWERS: [&str; 9] = [
    "encoder",
    "vision_tower",
    "vision_model",
    "visual",
    "audio_tower",
    "multi_modal_projector",
    "bert",
    "lm_head",
    "embed_out",
];
const EMBEDDINGS: [&str; 6] =
    ["embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "tokens_embed"];

impl Hook {
    pub fn parse(name: &str) -> Hook {
        let plain = name.trim().replace('[', ".").replace(']', "");
        let parts: Vec<&str> = plain.split('.').collect();
        let known = transformer_lens(&parts).or_else(|| hugging_face(parts));
        known.or_else(|| dictionary_learning(name)).unwrap_or_default()
    }

    fn of(site: Site, block: Option<i64>) -> Hook {
        match site {
            Site::Unknown => Hook::default(),
            site => Hook { place: Place::new(site, block), block },
        }
    }
}

/// `blocks.N.….hook_…`, and the few names outside the blocks.
fn transformer_lens(parts: &[&str]) -> Option<Hook> {
    let last = parts.last().filter(|last| last.starts_with("hook_"))?;
    let (site, block) = match parts {
        ["hook_embed"] | ["embed", "hook_out"] => {
            return Some(Hook { place: Place::token_embedding(), block: None });
        }
        ["ln_final", "hook_normalized"] => (Site::NormOutput, None),
        ["blocks", n, within @ ..] => match number(n) {
            Some(n) => (transformer_lens_site(within, last), Some(n)),
            None => (Site::Unknown, None),
        },
        _ => (Site::Unknown, None),
    };
    Some(Hook::of(site, block))
}

/// The names `ln1` and `ln2` with `hook_in` and `hook_out` mean other places in OLMo 2, and stay
/// unknown; `hook_q`, `hook_result` and their like are of single heads.
fn transformer_lens_site(within: &[&str], last: &str) -> Site {
    match within {
        ["hook_resid_pre" | "hook_in"] => Site::BlockInput,
        ["hook_resid_post" | "hook_out"] => Site::BlockOutput,
        // hook_mlp_in is a copy of the residual stream before the norm; mlp.hook_in is after it.
        ["hook_resid_mid" | "hook_mlp_in"] => Site::BlockMiddle,
        ["hook_attn_out"] | ["ln1_post", "hook_out"] => Site::AttentionOutput,
        ["attn" | "linear_attn", "hook_out"] | ["attn", "o", "hook_out"] => Site::AttentionOutput,
        ["hook_mlp_out"] | ["mlp", "hook_out"] | ["ln2_post", "hook_out"] => Site::MlpOutput,
        ["mlp", "out", "hook_out"] => Site::MlpOutput,
        ["mlp", "hook_in"] => Site::MlpInput,
        ["mlp", "hook_post"] | ["mlp", "in" | "gate" | "out", "hook_in"] => Site::LinearInput,
        ["attn", "q" | "k" | "v", "hook_in"] => Site::LinearInput,
        ["attn", "hook_z"] | ["attn", "o", "hook_in"] => Site::AttentionZ,
        ["attn" | "linear_attn", "hook_in"] => Site::AttentionInput,
        ["attn", "hook_k"] | ["attn", "k", "hook_out"] => Site::Keys,
        ["attn", "hook_v"] | ["attn", "v", "hook_out"] => Site::Values,
        ["ln1" | "ln2" | "ln1_post" | "ln2_post", _] if last == "hook_normalized" => {
            Site::NormOutput
        }
        _ => Site::Unknown,
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Port {
    Input,
    Output,
}

/// A module's dotted name, with `.output` or `.input` (nnsight's indices after them are of tuples).
fn hugging_face(mut parts: Vec<&str>) -> Option<Hook> {
    let is_port = |part: &str| matches!(part, "output" | "outputs" | "input" | "inputs");
    let tuple = parts.iter().rev().take_while(|part| number(part).is_some()).count();
    if parts.len() > tuple && is_port(parts[parts.len() - tuple - 1]) {
        parts.truncate(parts.len() - tuple);
    }
    let port = match parts.last() {
        Some(&("input" | "inputs")) => Port::Input,
        _ => Port::Output,
    };
    parts.pop_if(|part| is_port(part));
    let is_block = |i: &usize| STACKS.contains(&parts[i - 1]) && number(parts[*i]).is_some();
    let Some(at) = (1..parts.len()).find(is_block) else { return outside_blocks(&parts, port) };
    if !parts[..at - 1].iter().all(|part| HOLDERS.contains(part)) {
        return outside_blocks(&parts, port);
    }
    Some(Hook::of(module_site(&parts[at + 1..], port), number(parts[at])))
}

/// Embeddings, final norms, other towers.
fn outside_blocks(parts: &[&str], port: Port) -> Option<Hook> {
    let (first, last) = (parts.first()?, parts.last()?);
    let holders = &parts[..parts.len() - 1];
    match port {
        Port::Output
            if EMBEDDINGS.contains(last) && holders.iter().all(|part| HOLDERS.contains(part)) =>
        {
            Some(Hook { place: Place::token_embedding(), block: None })
        }
        Port::Output if TOWERS.contains(first) || parts.len() > 1 && HOLDERS.contains(first) => {
            Some(Hook::of(Site::ModuleOutput, None))
        }
        _ => None,
    }
}

/// A module within a decoder block.
fn module_site(within: &[&str], port: Port) -> Site {
    use Port::*;
    match (within, port) {
        ([], Input) => Site::BlockInput,
        ([], Output) => Site::BlockOutput,
        ([attention], port) if is_attention(attention) => match port {
            Input => Site::AttentionInput,
            Output => Site::AttentionOutput,
        },
        ([attention, .., linear], port) if is_attention(attention) => match (*linear, port) {
            ("o_proj" | "out_proj" | "c_proj" | "dense" | "wo", Input) => Site::AttentionZ,
            ("o_proj" | "out_proj" | "c_proj" | "dense" | "wo", Output) => Site::AttentionOutput,
            ("k_proj", Output) => Site::Keys,
            ("v_proj", Output) => Site::Values,
            (linear, port) => other_module(linear, port),
        },
        ([mlp], port) if is_mlp(mlp) => match port {
            Input => Site::MlpInput,
            Output => Site::MlpOutput,
        },
        ([mlp, down], Output)
            if is_mlp(mlp)
                && matches!(*down, "down_proj" | "c_proj" | "dense_4h_to_h" | "fc_out") =>
        {
            Site::MlpOutput
        }
        (["pre_feedforward_layernorm" | "ln_2"], Input) => Site::BlockMiddle,
        (["pre_feedforward_layernorm" | "ln_2"], Output) => Site::MlpInput,
        (["post_feedforward_layernorm"], Output) => Site::MlpOutput,
        (["input_layernorm" | "ln_1"], Input) => Site::BlockInput,
        (["input_layernorm" | "ln_1"], Output) => Site::AttentionInput,
        ([.., module], port) => other_module(module, port),
    }
}

fn other_module(module: &str, port: Port) -> Site {
    let is_linear = module.ends_with("_proj")
        || matches!(module, "c_attn" | "c_fc" | "query_key_value" | "fc1" | "fc2" | "fc_in")
        || matches!(module, "fc_out" | "dense_h_to_4h" | "dense_4h_to_h" | "dense");
    match port {
        Port::Output => Site::ModuleOutput,
        Port::Input if is_linear => Site::LinearInput,
        Port::Input => Site::Unknown,
    }
}

fn is_attention(module: &str) -> bool {
    matches!(module, "self_attn" | "attn" | "attention" | "self_attention" | "linear_attn")
}

fn is_mlp(module: &str) -> bool {
    matches!(module, "mlp" | "feed_forward" | "block_sparse_moe" | "ffn")
}

/// The submodule's name in its runs and folders: `resid_post_layer_15`, `mlp_out_layer3`.
fn dictionary_learning(name: &str) -> Option<Hook> {
    let (words, n) = name.split_once("_layer")?;
    let block = number(n.strip_prefix('_').unwrap_or(n))?;
    let site = match words {
        "resid_post" | "resid_out" => Site::BlockOutput,
        "resid_pre" => Site::BlockInput,
        "attention_out" | "attn_out" => Site::AttentionOutput,
        "mlp_out" => Site::MlpOutput,
        _ => return None,
    };
    Some(Hook::of(site, Some(block)))
}

/// A block's number: digits only, small enough to add 1 to.
fn number(text: &str) -> Option<i64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if digits { text.parse::<u32>().ok().map(i64::from) } else { None }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::Hook;
    use super::Site::{self, *};

    /// Names as their owners write them: site, layer, index into `hidden_states`.
    type Row = (&'static str, Site, Option<i64>, Option<i64>);

    fn check(rows: &[Row]) {
        for (hook, site, layer, index) in rows {
            let place = Hook::parse(hook).place;
            assert_eq!((place.site, place.layer), (*site, *layer), "{hook}");
            assert_eq!(place.hidden_states_index, *index, "{hook}");
        }
    }

    /// The hook points of TransformerLens 2.18 (HookedTransformer.hook_dict).
    #[test]
    fn names_of_transformer_lens_2_are_sites() {
        check(&[
            ("blocks.19.hook_resid_post", BlockOutput, Some(19), Some(20)),
            ("blocks.19.hook_resid_pre", BlockOutput, Some(18), Some(19)),
            ("blocks.0.hook_resid_pre", Embedding, None, Some(0)),
            ("blocks.3.hook_resid_mid", BlockMiddle, Some(3), None),
            ("blocks.3.hook_mlp_in", BlockMiddle, Some(3), None),
            ("blocks.3.hook_mlp_out", MlpOutput, Some(3), None),
            ("blocks.3.hook_attn_out", AttentionOutput, Some(3), None),
            ("blocks.3.attn.hook_z", AttentionZ, Some(3), None),
            ("blocks.3.attn.hook_k", Keys, Some(3), None),
            ("blocks.3.attn.hook_v", Values, Some(3), None),
            ("blocks.3.attn.hook_q", Unknown, None, None),
            ("blocks.3.attn.hook_result", Unknown, None, None),
            ("blocks.3.attn.hook_pattern", Unknown, None, None),
            ("blocks.3.hook_attn_in", Unknown, None, None),
            ("blocks.3.ln1.hook_normalized", NormOutput, Some(3), None),
            ("blocks.3.ln2.hook_normalized", NormOutput, Some(3), None),
            ("blocks.3.ln2.hook_scale", Unknown, None, None),
            ("blocks.3.mlp.hook_post", LinearInput, Some(3), None),
            ("blocks.3.mlp.hook_pre", Unknown, None, None),
            ("hook_embed", Embedding, None, None),
            ("hook_pos_embed", Unknown, None, None),
            ("ln_final.hook_normalized", NormOutput, None, None),
        ]);
    }

    /// Those of TransformerLens 3.9 (TransformerBridge.hook_dict of Llama, Gemma 2, GPT-2, GPT-NeoX).
    #[test]
    fn names_of_transformer_lens_3_are_sites() {
        check(&[
            ("blocks.5.hook_out", BlockOutput, Some(5), Some(6)),
            ("blocks.5.hook_in", BlockOutput, Some(4), Some(5)),
            ("blocks.0.hook_in", Embedding, None, Some(0)),
            ("blocks.5.attn.hook_out", AttentionOutput, Some(5), None),
            ("blocks.5.attn.hook_in", AttentionInput, Some(5), None),
            ("blocks.5.attn.o.hook_in", AttentionZ, Some(5), None),
            ("blocks.5.attn.o.hook_out", AttentionOutput, Some(5), None),
            ("blocks.5.attn.k.hook_out", Keys, Some(5), None),
            ("blocks.5.attn.v.hook_out", Values, Some(5), None),
            ("blocks.5.attn.q.hook_out", Unknown, None, None),
            ("blocks.5.mlp.hook_in", MlpInput, Some(5), None),
            ("blocks.5.mlp.hook_out", MlpOutput, Some(5), None),
            ("blocks.5.mlp.out.hook_in", LinearInput, Some(5), None),
            ("blocks.5.mlp.out.hook_out", MlpOutput, Some(5), None),
            ("blocks.5.ln1_post.hook_out", AttentionOutput, Some(5), None),
            ("blocks.5.ln2_post.hook_out", MlpOutput, Some(5), None),
            ("blocks.5.ln2.hook_out", Unknown, None, None),
            ("embed.hook_out", Embedding, None, None),
            ("pos_embed.hook_out", Unknown, None, None),
            ("unembed.hook_in", Unknown, None, None),
        ]);
    }

    /// By values: tests/make_site_names.py found what each hook of TransformerLens has in common with
    /// Hugging Face's modules. A name means what it means in all families, or is not known.
    #[test]
    fn names_of_transformer_lens_have_their_sites_values() {
        let text = include_str!("../../tests/data/sites.json");
        type Sites = BTreeSet<(String, Option<i64>)>;
        let families: BTreeMap<String, BTreeMap<String, Sites>> =
            serde_json::from_str(text).unwrap();
        let names: BTreeSet<&String> = families.values().flat_map(BTreeMap::keys).collect();
        // Raw values before norms that follow; the last block's output, whose number is not named.
        let left_out = [
            "blocks.1.ln1_post.hook_in",
            "blocks.1.ln2_post.hook_in",
            "blocks.1.attn.k_norm.hook_in",
            "blocks.1.attn.hook_hidden_states",
            "ln_final.hook_in",
        ];
        let mut known = 0;
        for name in names {
            let fitting: Vec<_> = families.values().filter_map(|of| of.get(name)).collect();
            let place = Hook::parse(name).place;
            if place.site != Unknown {
                known += 1;
                let told = (place.site.name().to_string(), place.layer);
                assert!(
                    fitting.iter().all(|of| of.contains(&told)),
                    "{name}: {place:?} {fitting:?}"
                );
                continue;
            }
            let common = |site: &&(String, Option<i64>)| fitting.iter().all(|of| of.contains(site));
            let missed = fitting[0].iter().find(common);
            assert!(missed.is_none() || left_out.contains(&&name[..]), "{name} is {missed:?}");
        }
        assert!(known >= 35, "only {known} names");
    }

    /// Modules of transformers 5.23 (named_modules of the families), with and without the wrappers of
    /// peft, DDP and torch.compile; `.output` and `.input` as Gemma Scope 2 writes them.
    #[test]
    fn names_of_hugging_face_modules_are_sites() {
        check(&[
            ("model.layers.7", BlockOutput, Some(7), Some(8)),
            ("model.layers.7.output", BlockOutput, Some(7), Some(8)),
            ("model.layers.7.input", BlockOutput, Some(6), Some(7)),
            ("model.layers.0.input", Embedding, None, Some(0)),
            ("model.language_model.layers.7", BlockOutput, Some(7), Some(8)),
            ("language_model.model.layers.7", BlockOutput, Some(7), Some(8)),
            ("base_model.model.model.layers.7", BlockOutput, Some(7), Some(8)),
            ("module._orig_mod.model.layers.7", BlockOutput, Some(7), Some(8)),
            ("model.decoder.layers.7", BlockOutput, Some(7), Some(8)),
            ("transformer.h.7", BlockOutput, Some(7), Some(8)),
            ("transformer.blocks.7", BlockOutput, Some(7), Some(8)),
            ("gpt_neox.layers.7", BlockOutput, Some(7), Some(8)),
            ("backbone.layers.7", BlockOutput, Some(7), Some(8)),
            ("model.layers.7.mlp", MlpOutput, Some(7), None),
            ("model.layers.7.mlp.input", MlpInput, Some(7), None),
            ("model.layers.7.mlp.down_proj", MlpOutput, Some(7), None),
            ("model.layers.7.mlp.down_proj.input", LinearInput, Some(7), None),
            ("model.layers.7.mlp.gate_proj.input", LinearInput, Some(7), None),
            ("model.layers.7.mlp.up_proj", ModuleOutput, Some(7), None),
            ("model.layers.7.block_sparse_moe", MlpOutput, Some(7), None),
            ("model.layers.7.feed_forward", MlpOutput, Some(7), None),
            ("transformer.h.7.mlp.c_proj", MlpOutput, Some(7), None),
            ("gpt_neox.layers.7.mlp.dense_4h_to_h", MlpOutput, Some(7), None),
            ("model.layers.7.self_attn", AttentionOutput, Some(7), None),
            ("model.layers.7.linear_attn", AttentionOutput, Some(7), None),
            ("model.layers.7.self_attn.o_proj", AttentionOutput, Some(7), None),
            ("model.layers.7.self_attn.o_proj.input", AttentionZ, Some(7), None),
            ("model.layers.7.self_attn.k_proj", Keys, Some(7), None),
            ("model.layers.7.self_attn.v_proj.output", Values, Some(7), None),
            ("model.layers.7.self_attn.q_proj", ModuleOutput, Some(7), None),
            ("model.layers.7.self_attn.q_proj.input", LinearInput, Some(7), None),
            ("transformer.h.7.attn", AttentionOutput, Some(7), None),
            ("transformer.h.7.attn.c_proj.input", AttentionZ, Some(7), None),
            ("transformer.h.7.attn.attention.out_proj.input", AttentionZ, Some(7), None),
            ("gpt_neox.layers.7.attention", AttentionOutput, Some(7), None),
            ("gpt_neox.layers.7.attention.dense.input", AttentionZ, Some(7), None),
            ("transformer.h.7.self_attention", AttentionOutput, Some(7), None),
            ("model.layers.7.pre_feedforward_layernorm.output", MlpInput, Some(7), None),
            ("model.layers.7.pre_feedforward_layernorm.input", BlockMiddle, Some(7), None),
            ("model.layers.7.post_feedforward_layernorm.output", MlpOutput, Some(7), None),
            ("model.layers.7.post_attention_layernorm.output", ModuleOutput, Some(7), None),
            ("model.layers.7.post_attention_layernorm.input", Unknown, None, None),
            ("model.layers.7.input_layernorm.input", BlockOutput, Some(6), Some(7)),
            ("model.layers.7.input_layernorm.output", AttentionInput, Some(7), None),
            ("transformer.h.7.ln_2.input", BlockMiddle, Some(7), None),
            ("model.embed_tokens", Embedding, None, None),
            ("transformer.wte", Embedding, None, None),
            ("gpt_neox.embed_in", Embedding, None, None),
            ("model.norm.output", ModuleOutput, None, None),
            ("model.visual.blocks.7", ModuleOutput, None, None),
            ("vision_tower.vision_model.encoder.layers.7.mlp", ModuleOutput, None, None),
            ("model.encoder.layers.7", ModuleOutput, None, None),
        ]);
    }

    /// nnsight's envoys, sparsify's hookpoints, dictionary_learning's submodules.
    #[test]
    fn names_of_other_libraries_are_sites() {
        check(&[
            ("model.layers[7].output[0]", BlockOutput, Some(7), Some(8)),
            ("model.layers[7].input[0][0]", BlockOutput, Some(6), Some(7)),
            ("model.model.layers[7].mlp.output", MlpOutput, Some(7), None),
            ("model.layers[7].self_attn.output[0]", AttentionOutput, Some(7), None),
            ("model.layers[7].self_attn.o_proj.input", AttentionZ, Some(7), None),
            ("transformer.h[7].output.0", BlockOutput, Some(7), Some(8)),
            ("layers.7", BlockOutput, Some(7), Some(8)),
            ("layers.7.mlp", MlpOutput, Some(7), None),
            ("layers.7.self_attn", AttentionOutput, Some(7), None),
            ("h.7.attn", AttentionOutput, Some(7), None),
            ("embed_tokens", Embedding, None, None),
            ("resid_post_layer_15", BlockOutput, Some(15), Some(16)),
            ("resid_out_layer3", BlockOutput, Some(3), Some(4)),
            ("mlp_out_layer_15", MlpOutput, Some(15), None),
            ("attention_out_layer_15", AttentionOutput, Some(15), None),
            ("attn_out_layer3", AttentionOutput, Some(3), None),
        ]);
    }

    #[test]
    fn other_words_are_unknown() {
        let words = [
            "",
            ".",
            "[",
            "layers",
            "layers.",
            "layers.x",
            "layers.-1",
            "layers.+1",
            "output",
            "blocks.x.hook_resid_post",
            "blocks.99999999999.hook_resid_post",
            "blocks.5.hook_new",
            "model.layers.99999999999",
            "encoder_blocks.5.hook_out",
            "custom",
            "a.b",
            "0",
            "7.output",
        ];
        for word in words {
            let place = Hook::parse(word).place;
            let known = place.layer.is_some() || place.hidden_states_index.is_some();
            assert!(!known && matches!(place.site, Unknown | ModuleOutput), "{word}: {place:?}");
        }
        assert_eq!(Hook::parse("custom"), Hook::default());
    }
}
