//! Markers of common chat templates. bindings/python/tests/test_markers.py compares each with what
//! transformers renders.

use std::borrow::Cow;

use super::{Closing, Markers, OtherTurns};
use crate::error::{Result, bail};

/// The names of the presets; qwen, gpt-oss and phi are other names of the one before.
pub const PRESETS: [&str; 13] = [
    "chatml", "qwen", "harmony", "gpt-oss", "llama3", "deepseek", "glm4", "gemma", "gemma4",
    "phi3", "phi", "mistral", "cohere",
];

impl Markers<'_> {
    /// The markers of a common chat template, by its name in [`PRESETS`].
    pub fn preset(name: &str) -> Result<Markers<'static>> {
        use OtherTurns::{Auto, Closed, Open};
        Ok(match name {
            // Qwen 2 to 3.8, LFM2, Nemotron 3.
            "chatml" | "qwen" => {
                markers(&["<|im_start|>assistant\n"], &["<|im_end|>"], &["<|im_start|>"], Auto)
            }
            // Each message of the assistant is a turn: thoughts, tool calls, answers.
            "harmony" | "gpt-oss" => markers(
                &["<|start|>assistant"],
                &["<|end|>", "<|call|>", "<|return|>"],
                &["<|start|>"],
                Auto,
            ),
            "llama3" => markers(
                &["<|start_header_id|>assistant<|end_header_id|>\n\n"],
                &["<|eot_id|>", "<|eom_id|>"],
                &["<|start_header_id|>"],
                Auto,
            ),
            // After a tool's reply the assistant goes on without a marker of its own.
            "deepseek" => markers(
                &["<｜Assistant｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁end｜>"],
                &["<｜end▁of▁sentence｜>"],
                &["<｜User｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>"],
                Open,
            ),
            // The assistant ends its turn by the marker of the role that is next; the template leaves
            // it out after the last.
            "glm4" => Markers {
                allow_unclosed: true,
                ..markers(
                    &["<|assistant|>"],
                    &["<|user|>", "<|observation|>", "<|system|>"],
                    &["<|user|>", "<|observation|>", "<|system|>"],
                    Open,
                )
            },
            "gemma" => {
                markers(&["<start_of_turn>model\n"], &["<end_of_turn>"], &["<start_of_turn>"], Auto)
            }
            // Tool replies stand within the assistant's turn.
            "gemma4" => markers(
                &["<|turn>model\n", "<tool_response|>"],
                &["<turn|>", "<|tool_response>"],
                &["<|turn>", "<|tool_response>"],
                Auto,
            ),
            "phi3" | "phi" => {
                markers(&["<|assistant|>\n"], &["<|end|>"], &["<|system|>\n", "<|user|>\n"], Closed)
            }
            "mistral" => markers(
                &["[/INST]", "[/TOOL_RESULTS]"],
                &["</s>"],
                &["[INST]", "[TOOL_RESULTS]"],
                Open,
            ),
            "cohere" => markers(
                &[
                    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
                    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",
                ],
                &["<|END_OF_TURN_TOKEN|>"],
                &["<|START_OF_TURN_TOKEN|>"],
                Auto,
            ),
            _ => bail!(
                InvalidArgument,
                "there is no preset {name:?} of markers; expected one of {}",
                PRESETS.join(", ")
            ),
        })
    }
}

fn markers(
    start: &'static [&'static str],
    end: &'static [&'static str],
    turn: &'static [&'static str],
    other_turns: OtherTurns,
) -> Markers<'static> {
    Markers {
        start: Cow::Borrowed(start),
        end: Cow::Borrowed(end),
        turn: Some(Cow::Borrowed(turn)),
        other_turns,
        injected: Cow::Borrowed(&[]),
        closing: Closing::Include,
        allow_unclosed: false,
    }
}
