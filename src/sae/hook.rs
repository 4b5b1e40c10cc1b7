//! Hook names: which of a model's hidden states an SAE reads.

/// The place that a hook name means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct HookPlace {
    /// 0-based decoder block: the one whose output is read, or in which the hook lies.
    pub layer: Option<i64>,
    /// Index into Hugging Face's `hidden_states`, if the hook reads a block boundary.
    pub hidden_states_index: Option<i64>,
}

impl HookPlace {
    /// Understands `blocks.N.hook_…` (TransformerLens) and `model.layers.N` (Hugging Face).
    pub fn parse(hook: &str) -> HookPlace {
        let boundary = |index: i64| HookPlace {
            layer: (index > 0).then(|| index - 1),
            hidden_states_index: Some(index),
        };
        if let Some(n) = hook.strip_prefix("model.layers.") {
            return number(n).map(|n| boundary(n + 1)).unwrap_or_default();
        }
        let parts = hook.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
        let Some((Some(n), site)) = parts.map(|(n, site)| (number(n), site)) else {
            return HookPlace::default();
        };
        match site {
            "hook_resid_post" => boundary(n + 1),
            // What enters block N is what left block N-1.
            "hook_resid_pre" => boundary(n),
            _ => HookPlace { layer: Some(n), hidden_states_index: None },
        }
    }
}

/// A block number: digits only, small enough to add 1 to.
fn number(text: &str) -> Option<i64> {
    text.parse::<u32>().ok().map(i64::from)
}

#[cfg(test)]
mod tests {
    use super::HookPlace;

    #[test]
    fn hooks_name_layers_and_hidden_states() {
        let cases = [
            ("blocks.19.hook_resid_post", Some(19), Some(20)),
            ("blocks.19.hook_resid_pre", Some(18), Some(19)),
            ("blocks.0.hook_resid_pre", None, Some(0)),
            ("blocks.3.hook_mlp_out", Some(3), None),
            ("blocks.3.attn.hook_z", Some(3), None),
            ("model.layers.7", Some(7), Some(8)),
            ("model.layers.7.mlp", None, None),
            ("blocks.99999999999.hook_resid_post", None, None),
            ("blocks.x.hook_resid_post", None, None),
            ("", None, None),
        ];
        for (hook, layer, index) in cases {
            let place = HookPlace::parse(hook);
            assert_eq!((place.layer, place.hidden_states_index), (layer, index), "{hook}");
        }
    }
}
