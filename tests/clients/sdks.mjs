// The Vercel AI SDK and openai-node against a running stack: node sdks.mjs BASE KEY MODEL. Prints what each got, as JSON.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [base, apiKey, name] = process.argv.slice(2);
const model = createOpenAICompatible({ name: "owngpt", baseURL: `${base}/v1`, apiKey })(name);
const weather = tool({ description: "The weather", inputSchema: z.object({ city: z.string().max(12) }) });
const said = {};

said.text = (await generateText({ model, prompt: "Say hello.", maxOutputTokens: 8 })).text;

let streamed = "";
for await (const piece of streamText({ model, prompt: "Say hello.", maxOutputTokens: 8 }).textStream) streamed += piece;
said.streamed = streamed;

const forced = await generateText({ model, prompt: "Weather in Rome?", tools: { weather }, toolChoice: "required", maxOutputTokens: 120, temperature: 0 });
said.calls = forced.toolCalls.map((call) => ({ name: call.toolName, input: call.input, invalid: Boolean(call.invalid) }));

const executed = [];
const told = await generateText({
  model, prompt: "Weather in Rome?", maxOutputTokens: 120, temperature: 0, stopWhen: stepCountIs(2),
  tools: { weather: tool({ ...weather, execute: async (input) => (executed.push(input), "sunny") }) },
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
});
said.executed = executed;
said.told = told.text;

const client = new OpenAI({ baseURL: `${base}/v1`, apiKey });
const first = await client.responses.create({ model: name, input: "My name is Ada.", max_output_tokens: 8 });
const second = await client.responses.create({ model: name, input: "And mine?", previous_response_id: first.id, max_output_tokens: 8 });
said.continued = second.previous_response_id === first.id;
const aborted = new AbortController();
const stream = await client.chat.completions.create(
  { model: name, messages: [{ role: "user", content: "A long story." }], stream: true, max_tokens: 500 }, { signal: aborted.signal });
for await (const _ of stream) aborted.abort();
said.aborted = true;

console.log(JSON.stringify(said));
