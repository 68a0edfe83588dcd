// The AI SDK's functions over one of its providers.
import { APICallError, embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import * as common from "./common.mjs";

// `made` is the provider with this key; `language` and `embedding` take a model of it.
export function programs({ made, language, embedding }) {
  const model = (name = common.CHAT, key = common.KEY) => language(made(key), name);
  const settings = { temperature: 0, maxOutputTokens: common.OUTPUT_TOKENS, maxRetries: 0 };
  const longer = { ...settings, maxOutputTokens: common.STRUCTURED_TOKENS };

  return {
    async chat() {
      const answer = await generateText({ ...settings, model: model(), prompt: common.QUESTION });
      return { text: answer.text, tokens: answer.usage.outputTokens };
    },

    async stream() {
      const failures = [];
      const onError = ({ error }) => failures.push(error);
      const answer = streamText({ ...settings, model: model(), prompt: common.QUESTION, onError });
      const pieces = [];
      for await (const piece of answer.textStream) pieces.push(piece);
      if (failures.length) throw failures[0];
      return { pieces, tokens: (await answer.usage).outputTokens };
    },

    async tools() {
      const weather = tool({
        description: "The weather of a city",
        inputSchema: common.Weather,
        execute: common.LOOPS ? common.weather : undefined,
      });
      const answer = await generateText({
        ...longer,
        model: model(),
        prompt: common.ASK_TOOL,
        tools: { [common.TOOL]: weather },
        toolChoice: common.LOOPS ? "auto" : { type: "tool", toolName: common.TOOL },
        stopWhen: stepCountIs(3),
      });
      const [call] = answer.steps.flatMap((step) => step.toolCalls);
      return { called: call.toolName, arguments: call.input, text: answer.text };
    },

    async structured() {
      const output = Output.object({ schema: common.Person });
      const answer = await generateText({ ...longer, model: model(), prompt: common.INVENT, output });
      return { value: answer.output };
    },

    async embeddings() {
      const answer = await embedMany({
        model: embedding(made(common.KEY), common.EMBED),
        values: common.TEXTS,
        maxRetries: 0,
      });
      return { vectors: answer.embeddings };
    },

    ask({ key, model: name, prompt, temperature }) {
      return generateText({ ...settings, model: model(name, key), prompt, temperature });
    },

    describe(error) {
      const said = error.data?.error ?? {};
      return {
        classes: [error.name, ...(APICallError.isInstance(error) ? ["APICallError"] : [])],
        status: error.statusCode,
        code: said.code,
        type: said.type,
        param: said.param,
        message: error.message.slice(0, 300),
      };
    },
  };
}
