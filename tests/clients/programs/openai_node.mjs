// OpenAI's own client for JavaScript: chat completions and responses.
import OpenAI from "openai";

const [url, questions] = process.argv.slice(2);
const asked = Object.fromEntries(
  Object.entries(JSON.parse(questions)).map(([name, content]) => [name, { role: "user", content }]),
);
const parameters = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const weather = { name: "weather", description: "Tells the weather.", parameters, strict: true };
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });
const found = {};

const chats = {
  plain: async (messages, more) =>
    (await client.chat.completions.create({ model: "scripted", messages, ...more })).choices[0].message,
  streamed: (messages, more) =>
    client.chat.completions.stream({ model: "scripted", messages, ...more }).finalMessage(),
};
for (const [way, ask] of Object.entries(chats)) {
  const tools = { tools: [{ type: "function", function: weather }] };
  const hello = await ask([asked.hello]);
  found[way] = hello.content;
  found[`next: ${way}`] = (await chats.plain([asked.hello, hello, asked.bye])).content;
  const thought = await ask([asked.think]);
  found[`next: ${way}, after a thought`] = (await chats.plain([asked.think, thought, asked.bye])).content;
  const called = await ask([asked.rome], tools);
  const [call] = called.tool_calls;
  found[`called: ${way}`] = JSON.parse(call.function.arguments);
  const result = { role: "tool", tool_call_id: call.id, content: "Sunny." };
  found[`told: ${way}`] = (await chats.plain([asked.rome, called, result], tools)).content;
}

const responses = {
  plain: (input, more) => client.responses.create({ model: "scripted", input, ...more }),
  streamed: (input, more) => client.responses.stream({ model: "scripted", input, ...more }).finalResponse(),
};
for (const [way, ask] of Object.entries(responses)) {
  const tools = { tools: [{ type: "function", ...weather }] };
  const hello = await ask([asked.hello]);
  found[`${way}: responses`] = hello.output_text;
  found[`next: responses, ${way}`] = (await ask([asked.hello, ...hello.output, asked.bye])).output_text;
  const thought = await ask([asked.think]);
  found[`next: responses, ${way}, after a thought`] = (
    await responses.plain([asked.think, ...thought.output, asked.bye])
  ).output_text;
  const called = await ask([asked.rome], tools);
  const [call] = called.output;
  found[`called: responses, ${way}`] = JSON.parse(call.arguments);
  const result = { type: "function_call_output", call_id: call.call_id, output: "Sunny." };
  found[`told: responses, ${way}`] = (
    await responses.plain([asked.rome, ...called.output, result], tools)
  ).output_text;
}
console.log(JSON.stringify(found));
