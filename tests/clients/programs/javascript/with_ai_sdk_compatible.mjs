// The AI SDK with its provider for servers that speak OpenAI's API.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { programs } from "./ai_sdk.mjs";
import * as common from "./common.mjs";

export const { chat, stream, tools, structured, embeddings, ask, describe } = programs({
  made: (apiKey) =>
    createOpenAICompatible({
      name: "galerne",
      baseURL: common.URL,
      apiKey,
      includeUsage: true,
      supportsStructuredOutputs: true,
    }),
  language: (provider, name) => provider(name),
  embedding: (provider, name) => provider.textEmbeddingModel?.(name) ?? provider.embeddingModel(name),
});
