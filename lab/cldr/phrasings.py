"""The phrasings of the CLDR questions in each language: some for training, some kept out of it.

``{thing}`` is the thing in question, ``{language}`` the name of the answer's language in the
question's language. The text after a line break is the sample's ``input``. Kept-out phrasings are
chosen here by hand, so that they stay out of training for every seed and number of samples.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasings:
    """Templates of one kind of question in one language, in two sets without a common one."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


# The English form of a thing, so that the Arabic language and the Arabic script are two questions.
ENGLISH_THINGS = {
    "territory": "{name}",
    "language": "the {name} language",
    "script": "the {name} script",
    "currency": "the currency {name}",
    "month": "the month {name}",
    "weekday": "{name}",
}
ENGLISH_NOUNS = {
    **{kind: (kind, "code") for kind in ("territory", "language", "script", "currency")},
    "month": ("month", "number"),
    "weekday": ("day of the week, from Monday,", "number"),
}

ENGLISH_NAME = Phrasings(
    train=(
        "What is {thing} called in {language}?",
        "How do you say {thing} in {language}?",
        "What is the {language} name of {thing}?",
        "Name {thing} in {language}.",
        "Give the {language} name.\n{thing}",
        "Which word does {language} use for {thing}?",
        "In {language}, how do you say {thing}?",
        "What is the {language} word for {thing}?",
        "Say {thing} in {language}.",
        "In {language}, which name does {thing} have?",
        "Translate into {language}.\n{thing}",
        "By which name is {thing} known in {language}?",
    ),
    held_out=("In {language}, what is {thing} called?", "Tell me the {language} name of {thing}."),
)
ENGLISH_CODE = Phrasings(
    train=(
        "Which {noun} has the {label} {code}? Answer in {language}.",
        "What is the {noun} with {label} {code} called in {language}?",
        "Give the {language} name of the {noun} with {label} {code}.",
        "Name in {language} the {noun} that has {label} {code}.",
        "To which {noun} does this {label} belong? Answer in {language}.\n{code}",
    ),
    held_out=("In {language}, what is the name of the {noun} with the {label} {code}?",),
)
ENGLISH_LINK = {
    "currency_of": Phrasings(
        train=(
            "What is the currency of {name}? Answer in {language}.",
            "Which currency is used in {name}? Say it in {language}.",
            "Name in {language} the money of {name}.",
            "Give the {language} name of the currency of this territory.\n{name}",
        ),
        held_out=("With which currency does one pay in {name}? Answer in {language}.",),
    ),
    "language_of": Phrasings(
        train=(
            "What is the official language of {name}? Answer in {language}.",
            "Which language is official in {name}? Say it in {language}.",
            "Name in {language} the official language of {name}.",
            "Give the {language} name of the official language of this territory.\n{name}",
        ),
        held_out=("Which official language does {name} have? Answer in {language}.",),
    ),
}

# Other languages of questions. Where a language would inflect the name of the answer's language,
# the name follows a colon in its plain form. {thing} is the name in the question's language.
NAME_IN = {
    "de": Phrasings(
        train=(
            "Wie heißt „{thing}“ auf {language}?",
            "Wie sagt man „{thing}“ auf {language}?",
            "Was bedeutet „{thing}“ auf {language}?",
            "Nenne den Namen auf {language}.\n{thing}",
        ),
        held_out=("Wie lautet „{thing}“ auf {language}?",),
    ),
    "fr": Phrasings(
        train=(
            "Comment dit-on « {thing} » en {language} ?",
            "Que veut dire « {thing} » en {language} ?",
            "Quel est le nom de « {thing} » en {language} ?",
            "Donne le nom en {language}.\n{thing}",
        ),
        held_out=("Comment appelle-t-on « {thing} » en {language} ?",),
    ),
    "es": Phrasings(
        train=(
            "¿Cómo se dice «{thing}» en {language}?",
            "¿Cómo se llama «{thing}» en {language}?",
            "¿Cuál es el nombre de «{thing}» en {language}?",
            "Da el nombre en {language}.\n{thing}",
        ),
        held_out=("¿Qué nombre tiene «{thing}» en {language}?",),
    ),
    "it": Phrasings(
        train=(
            "Come si dice «{thing}» in {language}?",
            "Come si chiama «{thing}» in {language}?",
            "Qual è il nome di «{thing}» in {language}?",
            "Scrivi il nome in {language}.\n{thing}",
        ),
        held_out=("Che nome ha «{thing}» in {language}?",),
    ),
    "pt": Phrasings(
        train=(
            "Como se diz “{thing}” em {language}?",
            "Como se chama “{thing}” em {language}?",
            "Qual é o nome de “{thing}” em {language}?",
            "Escreva o nome em {language}.\n{thing}",
        ),
        held_out=("Que nome tem “{thing}” em {language}?",),
    ),
    "nl": Phrasings(
        train=(
            "Hoe zeg je ‘{thing}’ in het {language}?",
            "Hoe heet ‘{thing}’ in het {language}?",
            "Wat is ‘{thing}’ in het {language}?",
            "Geef de naam in het {language}.\n{thing}",
        ),
        held_out=("Hoe noemt men ‘{thing}’ in het {language}?",),
    ),
    "sv": Phrasings(
        train=(
            "Vad heter ”{thing}” på {language}?",
            "Hur säger man ”{thing}” på {language}?",
            "Vad är ”{thing}” på {language}?",
            "Ange namnet på {language}.\n{thing}",
        ),
        held_out=("Vad kallas ”{thing}” på {language}?",),
    ),
    "da": Phrasings(
        train=(
            "Hvad hedder »{thing}« på {language}?",
            "Hvordan siger man »{thing}« på {language}?",
            "Hvad er »{thing}« på {language}?",
            "Angiv navnet på {language}.\n{thing}",
        ),
        held_out=("Hvad kaldes »{thing}« på {language}?",),
    ),
    "no": Phrasings(
        train=(
            "Hva heter «{thing}» på {language}?",
            "Hvordan sier man «{thing}» på {language}?",
            "Hva er «{thing}» på {language}?",
            "Skriv navnet på {language}.\n{thing}",
        ),
        held_out=("Hva kalles «{thing}» på {language}?",),
    ),
    "fi": Phrasings(
        train=(
            "Mitä on ”{thing}” tällä kielellä: {language}?",
            "Miten sanotaan ”{thing}” tällä kielellä: {language}?",
            "Mikä on sanan ”{thing}” vastine kielessä: {language}?",
            "Kirjoita nimi tällä kielellä: {language}.\n{thing}",
        ),
        held_out=("Mikä on ”{thing}” seuraavalla kielellä: {language}?",),
    ),
    "pl": Phrasings(
        train=(
            "Jak brzmi nazwa „{thing}” w języku: {language}?",
            "Jak powiedzieć „{thing}” w języku: {language}?",
            "Co znaczy „{thing}” w języku: {language}?",
            "Podaj nazwę w języku: {language}.\n{thing}",
        ),
        held_out=("Jak się mówi „{thing}” w języku: {language}?",),
    ),
    "cs": Phrasings(
        train=(
            "Jak se řekne „{thing}“ v jazyce: {language}?",
            "Jak zní „{thing}“ v jazyce: {language}?",
            "Co je „{thing}“ v jazyce: {language}?",
            "Uveď název v jazyce: {language}.\n{thing}",
        ),
        held_out=("Jak se nazývá „{thing}“ v jazyce: {language}?",),
    ),
    "ru": Phrasings(
        train=(
            "Как называется «{thing}» на языке: {language}?",
            "Как сказать «{thing}» на языке: {language}?",
            "Что такое «{thing}» на языке: {language}?",
            "Напиши название на языке: {language}.\n{thing}",
        ),
        held_out=("Как будет «{thing}» на языке: {language}?",),
    ),
    "tr": Phrasings(
        train=(
            "“{thing}” {language} nasıl denir?",
            "“{thing}” {language} ne demek?",
            "“{thing}” kelimesinin {language} karşılığı nedir?",
            "{language} adını yaz.\n{thing}",
        ),
        held_out=("“{thing}” {language} nasıl söylenir?",),
    ),
    "id": Phrasings(
        train=(
            "Apa nama “{thing}” dalam bahasa {language}?",
            "Apa bahasa {language} untuk “{thing}”?",
            "Bagaimana menyebut “{thing}” dalam bahasa {language}?",
            "Tulis namanya dalam bahasa {language}.\n{thing}",
        ),
        held_out=("Disebut apakah “{thing}” dalam bahasa {language}?",),
    ),
    "zh": Phrasings(
        train=(
            "“{thing}”用{language}怎么说？",
            "“{thing}”的{language}名称是什么？",
            "“{thing}”在{language}里叫什么？",
            "请写出{language}名称。\n{thing}",
        ),
        held_out=("请问{language}如何称呼“{thing}”？",),
    ),
    "ja": Phrasings(
        train=(
            "「{thing}」は{language}で何と言いますか。",
            "「{thing}」の{language}名は何ですか。",
            "{language}で「{thing}」をどう言いますか。",
            "{language}での名前を書いてください。\n{thing}",
        ),
        held_out=("「{thing}」は{language}で何と呼ばれますか。",),
    ),
    "ko": Phrasings(
        train=(
            "‘{thing}’의 {language} 이름은 무엇입니까?",
            "{language}로 ‘{thing}’은(는) 무엇입니까?",
            "‘{thing}’을(를) {language}로 어떻게 말합니까?",
            "{language} 이름을 쓰세요.\n{thing}",
        ),
        held_out=("‘{thing}’은(는) {language}로 뭐라고 합니까?",),
    ),
}
