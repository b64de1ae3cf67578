// The AI SDK with its provider for OpenAI-compatible services.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";

const [url, questions] = process.argv.slice(2);
const asked = Object.fromEntries(
  Object.entries(JSON.parse(questions)).map(([name, content]) => [name, { role: "user", content }]),
);
const provider = createOpenAICompatible({
  name: "here",
  baseURL: `${url}/v1`,
  apiKey: "any",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider("scripted");
const city = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const found = {};

const ways = {
  plain: async (messages, more) => {
    const { text, reasoningText, response } = await generateText({ model, messages, maxRetries: 0, ...more });
    return { text, reasoningText, turns: response.messages };
  },
  streamed: async (messages, more) => {
    const answer = streamText({ model, messages, maxRetries: 0, ...more });
    await answer.consumeStream();
    return { text: await answer.text, reasoningText: await answer.reasoningText, turns: (await answer.response).messages };
  },
};
for (const [way, ask] of Object.entries(ways)) {
  const hello = await ask([asked.hello]);
  found[way] = hello.text;
  found[`next: ${way}`] = (await ask([asked.hello, ...hello.turns, asked.bye])).text;
  const thought = await ask([asked.think]);
  found[`thought: ${way}`] = thought.reasoningText;
  found[`next: ${way}, after a thought`] = (await ask([asked.think, ...thought.turns, asked.bye])).text;
  const weather = tool({
    description: "Tells the weather.",
    inputSchema: jsonSchema(city),
    execute: async (given) => {
      found[`called: ${way}`] = given;
      return "Sunny.";
    },
  });
  const called = await ask([asked.rome], { tools: { weather }, stopWhen: stepCountIs(2) });
  found[`told: ${way}`] = called.text;
  found[`next: ${way}, after a call`] = (await ask([asked.rome, ...called.turns, asked.bye])).text;
}
const schema = {
  type: "object",
  properties: { city: { type: "string" }, degrees: { type: "integer" } },
  required: ["city", "degrees"],
  additionalProperties: false,
};
const typed = await generateText({
  model,
  messages: [asked.typed],
  output: Output.object({ schema: jsonSchema(schema) }),
  maxRetries: 0,
});
found.typed = typed.output;
console.log(JSON.stringify(found));
