// The AI SDK with its OpenAI provider, asked for chat completions.
import { createOpenAI } from "@ai-sdk/openai";
import { programs } from "./ai_sdk.mjs";
import * as common from "./common.mjs";

export const { chat, stream, tools, structured, ask, describe } = programs({
  made: (apiKey) => createOpenAI({ baseURL: common.URL, apiKey }),
  language: (provider, name) => provider.chat(name),
});
