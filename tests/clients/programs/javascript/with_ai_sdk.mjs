// The AI SDK with its OpenAI provider, which asks /v1/responses.
import { createOpenAI } from "@ai-sdk/openai";
import { programs } from "./ai_sdk.mjs";
import * as common from "./common.mjs";

export const { chat, stream, tools, structured, embeddings, ask, describe } = programs({
  made: (apiKey) => createOpenAI({ baseURL: common.URL, apiKey }),
  language: (provider, name) => provider(name),
  embedding: (provider, name) => provider.embedding(name),
});
