// What the JavaScript clients' programs share: where the server is, what is asked, which tool there is.
import { z } from "zod";

const env = process.env;
export const URL = `${env.GALERNE_URL}/v1`;
export const KEY = env.GALERNE_KEY;
export const CHAT = env.GALERNE_CHAT;
export const EMBED = env.GALERNE_EMBED;
// Whether the model may be left to decide when to call a tool and when to answer: the simulated one does as it is told.
export const LOOPS = env.GALERNE_LOOPS === "1";

export const QUESTION = "What is the capital of France?";
export const INVENT = "Invent a person.";
// The simulated engine calls a tool that it is told to call.
export const ASK_TOOL = "Call get_weather for Paris.";
export const TOOL = "get_weather";
export const TEXTS = ["The cat sat on the mat.", "A cat is on a mat.", "Interest rates rose."];
export const OUTPUT_TOKENS = 8;
export const STRUCTURED_TOKENS = 64;
export const TIMEOUT_MS = 240_000;

// Bounded: so small a model may never end a string by itself.
export const Person = z.object({ name: z.string().max(8), age: z.number().int().min(0).max(99) });
export const Weather = z.object({ city: z.string().max(8) });
export const weather = ({ city }) => `It is sunny in ${city}.`;

const asked = { key: KEY, model: CHAT, prompt: QUESTION, temperature: 0 };
export const REFUSALS = {
  wrong_key: { ...asked, key: "sk-nobody" },
  unknown_model: { ...asked, model: "no-such-model" },
  // Longer than any context that is served here.
  too_long: { ...asked, prompt: "word ".repeat(140_000) },
  bad_value: { ...asked, temperature: -3 },
};
