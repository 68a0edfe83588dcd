// The `openai` package for Node, both of its APIs.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import * as common from "./common.mjs";

const client = new OpenAI({ baseURL: common.URL, apiKey: common.KEY, maxRetries: 0, timeout: common.TIMEOUT_MS });
const asked = (prompt) => [{ role: "user", content: prompt }];
const settings = { model: common.CHAT, temperature: 0, max_tokens: common.OUTPUT_TOKENS };
const written = { model: common.CHAT, temperature: 0, max_output_tokens: common.OUTPUT_TOKENS };
const tool = {
  type: "function",
  function: {
    name: common.TOOL,
    description: "The weather of a city",
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 8 } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

export async function chat() {
  const answer = await client.chat.completions.create({ ...settings, messages: asked(common.QUESTION) });
  return { text: answer.choices[0].message.content, tokens: answer.usage.completion_tokens };
}

export async function stream() {
  const options = { stream: true, stream_options: { include_usage: true } };
  const chunks = await client.chat.completions.create({ ...settings, ...options, messages: asked(common.QUESTION) });
  const pieces = [];
  let tokens = null;
  for await (const chunk of chunks) {
    pieces.push(...chunk.choices.map((choice) => choice.delta.content).filter(Boolean));
    tokens = chunk.usage?.completion_tokens ?? tokens;
  }
  return { pieces, tokens };
}

export async function responses() {
  const answer = await client.responses.create({ ...written, input: common.QUESTION });
  return { text: answer.output_text, tokens: answer.usage.output_tokens };
}

export async function responses_stream() {
  const events = client.responses.stream({ ...written, input: common.QUESTION });
  const pieces = [];
  for await (const event of events) if (event.type === "response.output_text.delta") pieces.push(event.delta);
  return { pieces, tokens: (await events.finalResponse()).usage.output_tokens };
}

export async function tools() {
  const messages = asked(common.ASK_TOOL);
  const named = { type: "function", function: { name: common.TOOL } };
  const called = await client.chat.completions.create({
    ...settings,
    max_tokens: common.STRUCTURED_TOKENS,
    messages,
    tools: [tool],
    tool_choice: common.LOOPS ? "auto" : named,
  });
  const { message } = called.choices[0];
  const [call] = message.tool_calls;
  const args = JSON.parse(call.function.arguments);
  const result = { role: "tool", tool_call_id: call.id, content: common.weather(args) };
  const final = await client.chat.completions.create({
    ...settings,
    messages: [...messages, message, result],
    tools: [tool],
  });
  return { called: call.function.name, arguments: args, text: final.choices[0].message.content };
}

export async function structured() {
  const answer = await client.chat.completions.parse({
    ...settings,
    max_tokens: common.STRUCTURED_TOKENS,
    messages: asked(common.INVENT),
    response_format: zodResponseFormat(common.Person, "person"),
  });
  return { value: answer.choices[0].message.parsed };
}

export async function responses_structured() {
  const answer = await client.responses.parse({
    ...written,
    max_output_tokens: common.STRUCTURED_TOKENS,
    input: common.INVENT,
    text: { format: zodTextFormat(common.Person, "person") },
  });
  return { value: answer.output_parsed };
}

export async function embeddings() {
  // Without an encoding the package asks for base64 and decodes it.
  const answer = await client.embeddings.create({ model: common.EMBED, input: common.TEXTS });
  return { vectors: answer.data.map((row) => Array.from(row.embedding)) };
}

export function ask({ key, model, prompt, temperature }) {
  const body = { model, messages: asked(prompt), temperature, max_tokens: 4 };
  return client.withOptions({ apiKey: key }).chat.completions.create(body);
}

export function describe(error) {
  const { status, code, type, param, message } = error;
  return { classes: [error.constructor.name], status, code, type, param, message: message.slice(0, 300) };
}
